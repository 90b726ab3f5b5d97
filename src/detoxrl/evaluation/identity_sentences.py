"""Which civil sentences mention a group or are written in a dialect, and which neutral ones match them?

The method is that of Dixon et al. 2018 (AIES, "Measuring and mitigating unintended bias in text classification"):
templates, filled with a term that names a group or with one that names none. HateCheck (Röttger et al. 2021, ACL) has
such neutral and positive mentions too. Pairs of dialect and standard English follow Sap et al. 2019 (ACL); the
features of African American English are in Green 2002, chapters 2 to 4. All sentences were written for detoxrl. Every
one is civil; some are mildly negative ("was late again"), because classifiers differ most there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from detoxrl.config.tasks import TaskName
from detoxrl.data.conversations import as_text
from detoxrl.data.embedded.phrases import SPEAKERS
from detoxrl.data.rows import Row
from detoxrl.models.chat import Message

_TABLE = json.loads(Path(__file__).with_name("identity.json").read_text(encoding="utf-8"))
_TEMPLATES: list[str] = [template["text"] for template in _TABLE["templates"]]
_NEUTRAL: list[str] = _TABLE["neutral terms"]
_SLOT = "{term}"
DIALECT = "dialect"
"""The category of the groups that are ways to write, not mentions."""
# What the other speaker says in a dialogue to summarize.
_ANSWER = "I see, thank you for telling me."


class Pair(NamedTuple):
    """A sentence of a group, and the sentences that say the same without the mention or in standard English."""

    sentence: str
    neutral: tuple[str, ...]


class Group(NamedTuple):
    """A term that names a group, or a dialect: one pair for each template, or for each sentence of the dialect."""

    name: str
    category: str
    pairs: tuple[Pair, ...]


def _groups() -> Iterator[Group]:
    neutral = [tuple(template.replace(_SLOT, term) for term in _NEUTRAL) for template in _TEMPLATES]
    for category, terms in _TABLE["terms"].items():
        for term in terms:
            sentences = [template.replace(_SLOT, term) for template in _TEMPLATES]
            yield Group(term, category, tuple(map(Pair, sentences, neutral)))

    for name, rows in _TABLE["dialects"].items():
        yield Group(name, DIALECT, tuple(Pair(dialect, (standard,)) for standard, dialect in rows))


GROUPS = tuple(_groups())


def groups_within(prompts: int) -> tuple[Group, ...]:
    """Return the groups with their first pairs, equally many of each, so that there are at most so many sentences."""
    longest = min(len(group.pairs) for group in GROUPS)
    chosen = _first_pairs(0)
    for number in range(1, longest + 1):
        longer = _first_pairs(number)
        if len(numbered_sentences(longer)) <= prompts:
            chosen = longer
    return chosen


def _first_pairs(number: int) -> tuple[Group, ...]:
    return tuple(group._replace(pairs=group.pairs[:number]) for group in GROUPS)


def numbered_sentences(groups: tuple[Group, ...] = GROUPS) -> dict[str, int]:
    """Return each distinct sentence of the groups, neutral ones included, with the number of its pair."""
    numbers: dict[str, int] = {}
    for group in groups:
        for number, pair in enumerate(group.pairs):
            numbers.update(dict.fromkeys((pair.sentence, *pair.neutral), number))
    return numbers


def identity_rows(task: TaskName, prompts: int) -> dict[str, Row]:
    """Return rows of a task for the sentences of the groups, at most `prompts` of them, by sentence.

    A sentence is the text to continue, the user's message, the source to rewrite, or what the first of two speakers
    says. The sentences of a pair have the same id, so the same uniforms draw the responses to them.
    """
    rows = {}
    for sentence, number in numbered_sentences(groups_within(prompts)).items():
        text = sentence
        messages: tuple[Message, ...] = ()
        if task == "chat":
            messages = (Message(role="user", content=sentence),)
            text = as_text(messages)
        elif task == "summarize":
            text = f"{SPEAKERS[0]}: {sentence}\n{SPEAKERS[1]}: {_ANSWER}"
        rows[sentence] = Row(id=f"identity_{number}", text=text, messages=messages, task=task)
    return rows
