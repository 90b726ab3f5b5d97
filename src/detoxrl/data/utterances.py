"""What does the embedded reward model learn from?"""

from __future__ import annotations

import random

from detoxrl.data.corpus import draw_insult, draw_quarrel
from detoxrl.data.insults import SEEN_INSULTS, with_article
from detoxrl.data.phrases import PHRASES, SCENARIOS, SPEAKERS, say

_SPOKEN = ("follow-ups", "openings", "offers", "polite remarks", "pushbacks", "thanks", "greetings")


def _civil(rng: random.Random) -> str:
    quarrel = draw_quarrel(rng, rng.choice(SCENARIOS))
    kindness = f"{rng.choice(PHRASES['kindness'])} " if rng.random() < 0.6 else ""
    friend = kindness + rng.choice(PHRASES["friends"])
    spoken = [phrase for kind in _SPOKEN for phrase in PHRASES[kind]] + list(quarrel.scenario.excuses)
    phrase = rng.choice(rng.choice((spoken, PHRASES["civil reports"])))
    return phrase.format(friend=friend, a_friend=with_article(friend), **quarrel.words)


def _hateful(rng: random.Random) -> str:
    insult = draw_insult(rng, SEEN_INSULTS)
    if rng.random() < 0.5:
        return say(rng, "thrown insults", insult)
    # People also tell of quarrels: with the insult that fell, or civilly.
    return say(rng, "hateful reports", draw_quarrel(rng, rng.choice(SCENARIOS)).words | insult)


def generate_utterances(seed: int, size: int) -> list[tuple[str, bool]]:
    """Return `size` utterances, each with whether it is hateful; none holds an insult outside SEEN_INSULTS.

    Half are hateful; some carry a speaker and some a civil sentence beside the one that decides.
    """
    rng = random.Random(f"utterances {seed}")
    return [_utterance(rng, hateful=rng.random() < 0.5) for _ in range(size)]


def _utterance(rng: random.Random, hateful: bool) -> tuple[str, bool]:
    sentences = [_hateful(rng) if hateful else _civil(rng)]
    if rng.random() < 0.5:
        sentences.insert(rng.randrange(2), _civil(rng))
    speaker = f"{rng.choice(SPEAKERS)}: " if rng.random() < 0.3 else ""
    return speaker + " ".join(sentences), hateful
