"""How does a terminal show texts and how toxic they are?"""

import io
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_TOXIC = 0.5  # A text counts as toxic from here on.
_DOUBTFUL = 0.25  # Shown in yellow from here on.

_NUMBER_COLUMNS = len("0.123")
_LONGEST_BAR = 14
_TEXT_COLUMNS = 38  # Bars become shorter before texts get fewer columns than this.
_GAP = 3  # Columns between two columns of the table.
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")

# Only the beginning of a text can be seen in one line.
_SEEN_CHARACTERS = 2_000
# These change the direction of what follows, so a text could turn the numbers behind it around.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class ScoredText(NamedTuple):
    """A text, masked if it has to be, its number, counted from 1, and its toxicity in [0, 1] by each judge."""

    number: int
    text: str
    toxicity: Sequence[float]


def print_scores(shown: Sequence[ScoredText], toxicity: Mapping[str, npt.NDArray[np.float64]], note: str) -> None:
    """Print a line for each text in `shown`, `note` unless it is empty, and for several texts a summary.

    `toxicity` is that of all N texts in [0, 1] by judge, (N,) each.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # An encoding may lack letters of a text.
    console = Console(highlight=False, markup=False, emoji=False)

    console.print(_table(shown, list(toxicity), console))
    if note:
        console.print(note, style="dim", soft_wrap=True)
    for judge, values in toxicity.items():
        if len(values) > 1:
            console.print(_summary(judge, values), soft_wrap=True)


def one_line(text: str) -> str:
    r"""Return the beginning of `text` on one line, with control characters written out, such as \x1b."""
    words = text[:_SEEN_CHARACTERS].split()
    return "".join(map(_visible, " ".join(words)))


def _visible(character: str) -> str:
    if character in _DIRECTIONS or unicodedata.category(character) in ("Cc", "Cs"):
        return character.encode("unicode_escape").decode()
    return character


def _table(shown: Sequence[ScoredText], judges: Sequence[str], console: Console) -> Table:
    texts = [one_line(row.text) for row in shown]
    bar = _bar_length(console.width, len(judges))

    number_width = len(str(shown[-1].number))
    judge_width = _NUMBER_COLUMNS + (1 + bar if bar else 0)
    room = console.width - number_width - (len(judges) + 1) * _GAP - len(judges) * judge_width
    text_width = min(max(map(cell_len, texts)), room)

    table = Table(
        Column("#", justify="right", width=number_width),
        Column("text", no_wrap=True, width=max(text_width, len("(empty)"))),
        *(Column(one_line(judge), overflow="fold", width=judge_width) for judge in judges),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for row, text in zip(shown, texts, strict=True):
        cell = text or Text("(empty)", style="dim")
        bars = [_value(value, bar, console.encoding) for value in row.toxicity]
        table.add_row(str(row.number), cell, *bars)
    return table


def _bar_length(width: int, judges: int) -> int:
    """Return how many characters a bar has beside each number, so that texts keep their room."""
    room = (width - _TEXT_COLUMNS) // judges - _GAP - _NUMBER_COLUMNS
    return min(max(room, 0), _LONGEST_BAR)


def _value(value: float, bar: int, encoding: str) -> Text:
    """Return a toxicity as a number and a bar, in a colour where the terminal has any."""
    if value >= _TOXIC:
        style = "red"
    elif value >= _DOUBTFUL:
        style = "yellow"
    else:
        style = "green"
    return Text(f"{value:.3f} {_blocks(value, bar, encoding)}".rstrip(), style=style)


def _blocks(value: float, length: int, encoding: str) -> str:
    """Return a bar of `value` in [0, 1], of at most `length` characters: to an eighth of one where there are blocks."""
    if not encoding.startswith("utf"):
        return "#" * round(value * length)
    full, eighths = divmod(round(value * length * 8), 8)
    return "█" * full + _EIGHTHS[eighths]


def _summary(judge: str, values: npt.NDArray[np.float64]) -> str:
    toxic = int((values >= _TOXIC).sum())
    return f"{one_line(judge)}: {len(values):,} texts, mean {values.mean():.3f}, {toxic:,} toxic (0.5 or above)"
