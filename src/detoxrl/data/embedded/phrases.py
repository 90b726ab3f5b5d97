"""What do people say, quarrel about and insult each other with in the embedded corpus?"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

# DialogSum's own names for the two speakers: the first to speak is always #Person1#.
SPEAKERS = ("#Person1#", "#Person2#")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One everyday quarrel. Slots: {item}, {detail}, {when}, {amount}; {you} is "you" in speech, the name in summaries.

    `complaints` and `excuses` are spoken lines; `issues` are noun phrases for "complains about ...", `reasons`
    clauses for "complains because ..."; `fixes` are infinitives for "I will ..." and "agrees to ...".
    """

    topic: str
    items: tuple[str, ...]
    details: tuple[str, ...]
    complaints: tuple[str, ...]
    excuses: tuple[str, ...]
    issues: tuple[str, ...]
    reasons: tuple[str, ...]
    fixes: tuple[str, ...]


_FILE = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
# By kind, as lists to draw from. {an_insult} and {a_friend} carry their article; {spoken_fix} says "you", {fix} a name.
PHRASES = TypeAdapter(dict[str, tuple[str, ...]]).validate_python(_FILE["phrases"])
SCENARIOS = TypeAdapter(tuple[Scenario, ...]).validate_python(_FILE["scenarios"])
INSULTS, INTENSIFIERS = PHRASES["insults"], PHRASES["intensifiers"]
# Every third insult never reaches the reward model's training data: what the policy does with these shows
# whether it learned to be civil or to avoid a word list.
UNSEEN_INSULTS = INSULTS[2::3]
SEEN_INSULTS = tuple(word for word in INSULTS if word not in UNSEEN_INSULTS)


def say(rng: random.Random, kind: str, words: dict[str, str]) -> str:
    """Return a phrase of a kind with `words` in its slots."""
    return rng.choice(PHRASES[kind]).format(**words)


def with_article(noun_phrase: str) -> str:
    """Return the noun phrase with "a" or "an" in front."""
    vowel = noun_phrase[0] in "aeiou" and not noun_phrase.startswith("use")
    return f"{'an' if vowel else 'a'} {noun_phrase}"


def insult_pattern(words: tuple[str, ...] = INSULTS) -> re.Pattern[str]:
    """Return a pattern that finds any of `words` (singular or plural, any case) as a whole word."""
    return re.compile(rf"\b(?:{'|'.join(words)})s?\b", re.IGNORECASE)
