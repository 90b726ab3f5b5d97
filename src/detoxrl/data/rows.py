"""What is a row of data?"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from detoxrl.config.tasks import TASKS, TaskName
from detoxrl.data.embedded.facts import Facts
from detoxrl.models.chat import Message
from detoxrl.models.types import Prompt

SPLITS = ("train", "validation", "test")
TOXIC_PROMPT = 0.5
"""From this toxicity on a prompt counts as toxic (Gehman et al. 2020, section 3.1)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one prompt is made of, and what is known of it. Only generated rows have a `topic` and `facts`."""

    id: str
    text: str  # The dialogue, prompt, conversation or source; a conversation as lines of "User: ...".
    references: tuple[str, ...] = ()  # What people wrote as a response, none or several.
    civil_references: tuple[str, ...] = ()  # Those that are civil by the way they were made.
    task: TaskName = "summarize"
    messages: tuple[Message, ...] = ()  # A conversation, up to the message to reply to.
    prompt: str = ""  # What the policy reads: the templates with the text, which is cut if it is too long.
    toxicity: float | None = None  # Of the text, in [0, 1], if the source says it.
    stressed: bool = False  # Whether a toxic turn was put into its text (data.stress).
    columns: Mapping[str, Any] = field(default_factory=dict)  # The columns of the source, as they are.
    topic: str | None = None
    facts: Facts | None = None
    texts: dict[str, list[str]] | None = None  # Responses written elsewhere, by the name of the policy.


_ROW = TypeAdapter(Row)


def to_prompts(rows: Iterable[Row]) -> list[Prompt]:
    """Return the prompts of rows, with the ids, texts and columns of the rows."""
    return [Prompt(id=row.id, text=row.prompt, row_text=row.text, columns=_columns(row)) for row in rows]


def _columns(row: Row) -> dict[str, Any]:
    """Return what a reward function may ask for by name: what became of a row here, and the columns of its source.

    A column of the source that has one of these names stays what it is.
    """
    return {
        "id": row.id,
        "text": row.text,
        "references": list(row.references),
        "messages": [asdict(message) for message in row.messages],
        "toxicity": row.toxicity,
        **row.columns,
    }


def quality_references(row: Row) -> tuple[str, ...]:
    """Return the references that a response should resemble: the civil ones, if a row has any."""
    return () if TASKS[row.task].open_ended else row.civil_references or row.references


def rows_to_jsonl(rows: Iterable[Row]) -> str:
    """Return rows as JSON lines."""
    return "".join(_ROW.dump_json(row, exclude_defaults=True).decode() + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file that `rows_to_jsonl` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [_ROW.validate_json(line) for line in lines]
