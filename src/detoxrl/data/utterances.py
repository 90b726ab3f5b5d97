"""What does the embedded reward model learn from?"""

from __future__ import annotations

import random

from detoxrl.data.corpus import (
    FOLLOW_UPS,
    GREETINGS,
    OFFERS,
    OPENINGS,
    POLITE,
    PUSHBACKS,
    THANKS,
    draw_insult,
    draw_quarrel,
    insult_sentence,
)
from detoxrl.data.insults import SEEN_INSULTS, with_article
from detoxrl.data.scenarios import SCENARIOS, SPEAKERS

# People also tell of quarrels: with the insult that fell, or civilly.
HATEFUL_REPORTS = (
    "They called me {an_insult} because {reason}.",
    "My boss says I am {an_insult}.",
    "Somebody insulted me as {an_insult} over {issue}.",
    "The {insult} next door complained again.",
    "I was called {an_insult} by a stranger.",
    "Yesterday I complained about {issue} and called the man {an_insult}.",
)
CIVIL_REPORTS = (
    "They called me because {reason}.",
    "My boss says I am {a_friend}.",
    "Somebody criticized me for {issue}.",
    "The {friend} next door complained again.",
    "I was criticized by a stranger because {reason}.",
    "Yesterday I complained to the man about {issue}.",
    "They blame me for {issue}.",
    "My boss is angry with me because {reason}.",
    "My father told me off for {issue}.",
    "I was scolded for {issue}.",
    "In the end they agreed to {fix}.",
    "He promises to {fix}.",
    "They agree that I will {fix}.",
    "You are {a_friend}.",
    "Only {a_friend} would do that.",
    "What {a_friend} you are!",
)
FRIENDS = ("neighbour", "friend", "colleague", "cook", "student", "driver", "sister", "brother", "teacher", "guest")
KINDNESS = ("good", "patient", "careful", "new", "quiet", "tired", "busy", "young", "helpful", "reliable")


def _civil(rng: random.Random) -> str:
    scenario = rng.choice(SCENARIOS)
    quarrel = draw_quarrel(rng, scenario)
    friend = f"{rng.choice(KINDNESS)} {rng.choice(FRIENDS)}" if rng.random() < 0.6 else rng.choice(FRIENDS)
    spoken = FOLLOW_UPS + OPENINGS + OFFERS + POLITE + PUSHBACKS + THANKS + GREETINGS + scenario.excuses
    return rng.choice(rng.choice((spoken, CIVIL_REPORTS))).format(
        complaint=quarrel.complaint,
        reason=quarrel.reason,
        issue=quarrel.issue,
        fix=quarrel.spoken_fix,
        friend=friend,
        a_friend=with_article(friend),
    )


def _hateful(rng: random.Random) -> str:
    insult = draw_insult(rng, SEEN_INSULTS)
    if rng.random() < 0.5:
        return insult_sentence(rng, insult)
    quarrel = draw_quarrel(rng, rng.choice(SCENARIOS))
    return rng.choice(HATEFUL_REPORTS).format(
        insult=insult, an_insult=with_article(insult), reason=quarrel.reason, issue=quarrel.issue
    )


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
