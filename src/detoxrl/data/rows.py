"""What is a row of data, and how does it become a prompt?"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from detoxrl.config.schema import DataConfig
from detoxrl.data.embedded.facts import Facts
from detoxrl.errors import InputError
from detoxrl.models.types import Prompt

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One dialogue. Only generated rows have a `topic`, `facts` and a `civil_reference`."""

    id: str
    dialogue: str
    summary: str | None
    prompt: str = ""  # What the policy reads: the template with the dialogue, which is cut if it is too long.
    topic: str | None = None
    facts: Facts | None = None
    civil_reference: str | None = None
    texts: dict[str, list[str]] | None = None  # Responses written elsewhere, by the name of the policy.


_ROW = TypeAdapter(Row)


def token_lengths(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text, special tokens included."""
    if not texts:
        return []
    return [len(ids) for ids in tokenizer(list(texts)).input_ids]


def with_prompts(
    rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], list[int]]:
    """Return the rows with prompts of at most `max_prompt_tokens`, and the length of each prompt before it was cut.

    Raises InputError when the template alone is longer.
    """
    prompts = [_prompt(row.dialogue, config) for row in rows]
    lengths = token_lengths(tokenizer, prompts)
    for i, length in enumerate(lengths):
        if length > config.max_prompt_tokens:
            prompts[i] = _cut_prompt(rows[i].dialogue, config, tokenizer)

    prompted = [replace(row, prompt=prompt) for row, prompt in zip(rows, prompts, strict=True)]
    return prompted, lengths


def _prompt(dialogue: str, config: DataConfig) -> str:
    return config.template.replace("{dialogue}", dialogue)


def _cut_prompt(dialogue: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt with the longest beginning of the dialogue that fits, cut between words where possible."""

    def tokens(characters: int) -> int:
        return len(tokenizer(_prompt(dialogue[:characters], config)).input_ids)

    fitting = bisect_right(range(len(dialogue)), config.max_prompt_tokens, key=tokens) - 1
    if fitting < 0:
        rule = f"is less than the {tokens(0)} tokens of the template alone"
        raise InputError("data.max_prompt_tokens", config.max_prompt_tokens, rule, "raise it, or shorten the template")

    beginning = dialogue[:fitting]
    # One more character shows whether the last word is complete.
    whole_words = re.match(r".*(?=\s)", dialogue[: fitting + 1], re.DOTALL)
    if whole_words and whole_words[0].strip():
        beginning = whole_words[0]
    return _prompt(beginning, config)


def to_prompts(rows: Iterable[Row]) -> list[Prompt]:
    """Return the prompts of rows, with the ids of the rows."""
    return [Prompt(id=row.id, text=row.prompt) for row in rows]


def rows_to_jsonl(rows: Iterable[Row]) -> str:
    """Return rows as JSON lines."""
    return "".join(_ROW.dump_json(row).decode() + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file that `rows_to_jsonl` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [_ROW.validate_json(line) for line in lines]
