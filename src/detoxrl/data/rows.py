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
    """One dialogue; `topic`, `facts` and `civil_reference` are known for generated rows only."""

    id: str
    dialogue: str
    summary: str | None
    prompt: str = ""  # What the policy reads: the template around the dialogue, which is cut where it is too long.
    topic: str | None = None
    facts: Facts | None = None
    civil_reference: str | None = None
    texts: dict[str, list[str]] | None = None  # Responses by policy, where these were written elsewhere.


_ROW = TypeAdapter(Row)


def token_lengths(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Return how many tokens each text has, special tokens included."""
    return [len(ids) for ids in tokenizer(list(texts)).input_ids] if texts else []


def with_prompts(
    rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], list[int]]:
    """Return rows with prompts that fit, and the lengths before any cut. Raises InputError if the template does not."""
    prompts = [config.template.replace("{dialogue}", row.dialogue) for row in rows]
    lengths = token_lengths(tokenizer, prompts)
    for i, length in enumerate(lengths):
        if length > config.max_prompt_tokens:
            prompts[i] = _cut(rows[i].dialogue, config, tokenizer)
    return [replace(row, prompt=prompt) for row, prompt in zip(rows, prompts, strict=True)], lengths


def _cut(dialogue: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt with the longest beginning of the dialogue that fits, cut between words where there are any."""

    def tokens(characters: int) -> int:
        return len(tokenizer(config.template.replace("{dialogue}", dialogue[:characters])).input_ids)

    fitting = bisect_right(range(len(dialogue)), config.max_prompt_tokens, key=tokens) - 1
    if fitting < 0:
        rule = f"is less than the template itself takes ({tokens(0)})"
        raise InputError("data.max_prompt_tokens", config.max_prompt_tokens, rule, "give more, or a shorter template")
    whole_words = re.match(r".*(?=\s)", dialogue[: fitting + 1], re.DOTALL)
    kept = whole_words[0] if whole_words and whole_words[0].strip() else dialogue[:fitting]
    return config.template.replace("{dialogue}", kept)


def to_prompts(rows: Iterable[Row]) -> list[Prompt]:
    """Return the prompts of rows, under the rows' ids."""
    return [Prompt(id=row.id, text=row.prompt) for row in rows]


def rows_to_jsonl(rows: Iterable[Row]) -> str:
    """Return one JSON object a line."""
    return "".join(_ROW.dump_json(row).decode() + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Return the rows that `rows_to_jsonl` wrote to `path`."""
    with path.open(encoding="utf-8") as lines:
        return [_ROW.validate_json(line) for line in lines]
