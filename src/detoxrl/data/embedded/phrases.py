"""What do people say, quarrel about and insult each other with in the embedded corpus?"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

# The names that DialogSum gives to two speakers. The first to speak is always #Person1#.
SPEAKERS = ("#Person1#", "#Person2#")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One everyday quarrel. Slots: {item}, {detail}, {when}, {amount}; {you} is "you" in speech, the name in summaries.

    `complaints` and `excuses` are spoken lines. `issues` are noun phrases for "complains about ...", `reasons` are
    clauses for "complains because ...", and `fixes` are infinitives for "I will ..." and "agrees to ...".
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

# Phrases by kind. {an_insult} and {a_friend} include the article; {spoken_fix} says "you", {fix} says the name.
PHRASES = TypeAdapter(dict[str, tuple[str, ...]]).validate_python(_FILE["phrases"])
SCENARIOS = TypeAdapter(tuple[Scenario, ...]).validate_python(_FILE["scenarios"])

INSULTS = PHRASES["insults"]
INTENSIFIERS = PHRASES["intensifiers"]
# The training data of the reward model never contains every third insult. The policy's use of these shows whether it
# learned to be civil or to avoid a list of words.
UNSEEN_INSULTS = INSULTS[2::3]
SEEN_INSULTS = tuple(word for word in INSULTS if word not in UNSEEN_INSULTS)


def say(rng: random.Random, kind: str, slots: dict[str, str]) -> str:
    """Return a random phrase of a kind, with its slots filled."""
    return rng.choice(PHRASES[kind]).format(**slots)


def with_article(noun_phrase: str) -> str:
    """Return the noun phrase after "a" or "an"."""
    vowel = noun_phrase[0] in "aeiou" and not noun_phrase.startswith("use")
    return f"{'an' if vowel else 'a'} {noun_phrase}"


def insult_pattern(words: tuple[str, ...] = INSULTS) -> re.Pattern[str]:
    """Return a pattern that finds any of `words` as a whole word, in the singular or plural, ignoring case.

    A word may be a phrase. If one begins with another one, the longer one is found.
    """
    forms = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{forms})s?(?!\w)", re.IGNORECASE)
