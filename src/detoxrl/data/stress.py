"""How does a toxic turn get into a clean row?"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from detoxrl.data.conversations import as_text, spoken
from detoxrl.data.rows import Row
from detoxrl.models.chat import Message
from detoxrl.runtime.randomness import uniforms

STRESSED_SHARE = 0.5
"""The share of the rows that get a turn, if they have a place for one."""
# "Name: what is said", or a name alone where the next turn is to be written.
_TURN = re.compile(r"\s*([^\s:](?:[^:]{0,38}[^\s:])?)\s*:(?:\s|$)")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+(?=\S)")
_CLOSED = re.compile(r"[.!?…][\"'”’)]*$")
_Item = TypeVar("_Item")


class _Draw(NamedTuple):
    """Four numbers in [0, 1) that decide what becomes of a row."""

    stressed: float
    line: float
    place: float
    speaker: float


class Stressed(NamedTuple):
    """The rows of a split, half of them with a toxic turn."""

    rows: list[Row]
    turns: list[str | None]  # The turn that each row was given; None: it stays as it is.
    without_place: int  # How many rows were to get a turn and have no place for one.


def with_stress(rows: Sequence[Row], turns: Sequence[str], split: str, seed: int) -> Stressed:
    """Return the rows, about half of them with one of the `turns`. Seed, split and a row's id decide everything."""
    stressed = []
    given: list[str | None] = []
    without_place = 0
    for row in rows:
        draw = _Draw(*uniforms(seed, "stress", 0, [f"{split} {row.id}"], 0, len(_Draw._fields))[0])
        turn = _pick(turns, draw.line) if draw.stressed < STRESSED_SHARE else None
        changed = None if turn is None else _with_turn(row, turn, draw)
        without_place += turn is not None and changed is None
        stressed.append(changed or row)
        given.append(turn if changed else None)
    return Stressed(stressed, given, without_place)


def _pick(items: Sequence[_Item], number: float) -> _Item:
    return items[int(number * len(items))]


def _with_turn(row: Row, turn: str, draw: _Draw) -> Row | None:
    """Return the row with a turn in its own format, None if it has no place for one."""
    if row.task == "chat":
        messages = _in_user_message(row.messages, turn, draw)
        return replace(row, messages=messages, text=as_text(spoken(messages)), stressed=True)

    text = _before_the_end(row.text, turn, draw) if row.task == "continue" else _in_dialogue(row.text, turn, draw)
    return None if text is None else replace(row, text=text, stressed=True)


def _in_dialogue(text: str, turn: str, draw: _Draw) -> str | None:
    """Return a dialogue with the turn behind any other, said by any of its speakers; None for a text without turns."""
    lines = text.rstrip().split("\n")
    speakers = _speakers(lines)
    if speakers is None:
        return None

    starts = [*list(speakers)[1:], len(lines)]
    return _inserted(lines, _pick(starts, draw.place), _pick(sorted(set(speakers.values())), draw.speaker), turn)


def _before_the_end(text: str, turn: str, draw: _Draw) -> str | None:
    """Return a text to continue with the turn before its last turn, line or sentence, which is what is continued."""
    lines = text.split("\n")
    speakers = _speakers(lines)
    if speakers is not None:
        last, last_speaker = list(speakers.items())[-1]
        others = sorted(set(speakers.values()) - {last_speaker}) or [last_speaker]
        return _inserted(lines, last, _pick(others, draw.speaker), turn)

    written = [number for number, line in enumerate(lines) if line.strip()]
    if len(written) > 1:
        return _inserted(lines, written[-1], None, turn)

    sentence = turn if _CLOSED.search(turn) else f"{turn}."
    ends = list(_SENTENCE_END.finditer(text))
    start = ends[-1].end() if ends else 0
    return f"{text[:start]}{sentence} {text[start:]}"


def _in_user_message(messages: Sequence[Message], turn: str, draw: _Draw) -> tuple[Message, ...]:
    """Return a conversation with the turn as the first line of one of the user's messages.

    It is no message of its own: many chat templates refuse two messages of the user in a row.
    """
    numbers = [number for number, message in enumerate(messages) if message.role == "user"]
    chosen = _pick(numbers, draw.place)
    changed = list(messages)
    changed[chosen] = replace(messages[chosen], content=f"{turn}\n{messages[chosen].content}")
    return tuple(changed)


def _speakers(lines: Sequence[str]) -> dict[int, str] | None:
    """Return the speaker of each line that begins a turn; None for a text with fewer than two turns."""
    matches = {number: _TURN.match(line) for number, line in enumerate(lines)}
    speakers = {number: match[1] for number, match in matches.items() if match}
    return speakers if len(speakers) > 1 else None


def _inserted(lines: Sequence[str], number: int, speaker: str | None, turn: str) -> str:
    """Return the text of the lines with the turn as line `number`, with the line ends of the others."""
    line = turn if speaker is None else f"{speaker}: {turn}"
    before = list(lines[:number])
    behind = list(lines[number:])
    if lines[0].endswith("\r"):
        line = f"{line}\r" if behind else line
        before[-1] = before[-1] if before[-1].endswith("\r") else f"{before[-1]}\r"
    return "\n".join([*before, line, *behind])
