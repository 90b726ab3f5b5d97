"""What do people say and quarrel about in the embedded corpus, and how is each fact put into words?"""

from __future__ import annotations

import json
import random
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


def say(rng: random.Random, kind: str, words: dict[str, str]) -> str:
    """Return a phrase of a kind with `words` in its slots."""
    return rng.choice(PHRASES[kind]).format(**words)
