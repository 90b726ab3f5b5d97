"""A reward function receives the columns that it names, whatever form it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detoxrl.config.terms import parse_term
from detoxrl.data.rows import Row, to_prompts
from detoxrl.errors import InputError
from detoxrl.models.types import Prompt
from detoxrl.rewards.function import validated_reward
from detoxrl.rewards.terms import text_score

ROWS = [
    Row(
        id=f"r{i}", text=f"text {i}", references=(f"ref {i}",), prompt=f"<{i}>", columns={"weight": i, "prompts": "own"}
    )
    for i in range(3)
]
PROMPTS: list[Prompt] = to_prompts(ROWS)
RESPONSES = ["a", "b", "c"]
seen: dict[str, Any] = {}


def scores(function: Callable[..., Any]) -> list[float]:
    seen.clear()
    found: list[float] = validated_reward(function, "f")(PROMPTS, RESPONSES).tolist()
    return found


def test_columns_are_lists_in_the_order_of_the_prompts() -> None:
    def reward(prompts: list[str], responses: list[str], weight: list[int], *, text: list[str], **others: Any) -> Any:
        seen.update(prompts=prompts, text=text, others=others)
        return [float(value) for value in weight]

    assert scores(reward) == [0.0, 1.0, 2.0]
    assert seen["prompts"] == ["<0>", "<1>", "<2>"]
    assert seen["text"] == ["text 0", "text 1", "text 2"]
    # A column that is called like a parameter of every function cannot be given a second time.
    assert set(seen["others"]) == {"id", "references", "messages", "toxicity"}
    assert seen["others"]["references"] == [["ref 0"], ["ref 1"], ["ref 2"]]


def test_positional_parameters_are_prompts_and_responses() -> None:
    def reward(prompts: list[str], responses: list[str], /, weight: list[int]) -> Any:
        return weight

    assert scores(reward) == [0.0, 1.0, 2.0]


def test_a_default_stands_for_a_column_that_there_is_not() -> None:
    def reward(prompts: list[str], responses: list[str], mood: float = 7.0) -> Any:
        return [mood for _ in responses]

    assert scores(reward) == [7.0] * 3

    def without(prompts: list[str], responses: list[str], mood: float) -> Any:
        return [mood for _ in responses]

    with pytest.raises(InputError, match=r"reward\.function = 'f': asks for mood, and the rows have no such column"):
        scores(without)


def test_wrappers_objects_and_builtins_get_prompts_and_responses_alone() -> None:
    def wrapper(*arguments: Any, **columns: Any) -> Any:
        assert not columns
        return [float(len(text)) for text in arguments[1]]

    class Counter:
        def __call__(self, prompts: list[str], responses: list[str]) -> Any:
            return [1.0 for _ in responses]

    assert scores(wrapper) == [1.0] * 3
    assert scores(Counter()) == [1.0] * 3
    with pytest.raises(InputError, match=r"returned list, not numbers"):
        scores(max)


def test_the_text_of_a_row_is_not_a_column_of_the_source_that_has_its_name() -> None:
    changed = Row(id="file_0", text="A: Hello, you idiot.", columns={"text": "A: Hello."})
    (prompt,) = to_prompts([changed])
    assert prompt.row_text == "A: Hello, you idiot."
    copy = parse_term("copy")
    assert text_score(copy, None)([prompt], ["A: Hello, you idiot."]).tolist() == [1.0]


def test_a_column_of_the_source_keeps_its_own_value() -> None:
    row = Row(id="file_0", text="t", columns={"id": "a7", "toxicity": "high"})
    (prompt,) = to_prompts([row])
    assert (prompt.columns["id"], prompt.columns["toxicity"], prompt.columns["text"]) == ("a7", "high", "t")


# Functions written for other libraries, and what is no reward


def test_a_function_written_for_trl_gets_everything_by_name() -> None:
    def reward(completions: list[str], **kwargs: Any) -> Any:
        seen.update(completions=completions, **kwargs)
        return [float(len(text)) for text in completions]

    assert scores(reward) == [1.0] * 3
    assert seen["completions"] == RESPONSES
    assert seen["prompts"] == ["<0>", "<1>", "<2>"]
    assert seen["weight"] == [0, 1, 2]

    def alone(*, completions: list[str]) -> Any:
        return [2.0 for _ in completions]

    def with_prompts(prompts: list[str], completions: list[str], weight: list[int]) -> Any:
        assert prompts == ["<0>", "<1>", "<2>"]
        return weight

    assert scores(alone) == [2.0] * 3
    assert scores(with_prompts) == [0.0, 1.0, 2.0]

    def asks(completions: list[str], completion_ids: list[list[int]]) -> Any:
        return [0.0 for _ in completions]

    with pytest.raises(InputError, match="asks for completion_ids, and the rows have no such column"):
        scores(asks)


@pytest.mark.parametrize(
    ("function", "parameters"), [(lambda: [0.0], r"\(\)"), (lambda responses: [0.0], r"\(responses\)")]
)
def test_a_function_that_cannot_take_prompts_and_responses_is_refused(function: Any, parameters: str) -> None:
    rule = rf"has the parameters {parameters}, and is called with prompts and responses: .*; write `def score\(prompts"
    with pytest.raises(InputError, match=rule):
        scores(function)


@pytest.mark.parametrize("number", range(9))
def test_what_is_no_list_of_numbers_is_refused(number: int) -> None:
    returned: Any = (
        torch.ones(3, dtype=torch.complex64), torch.ones(3, device="meta"), torch.ones(3).to_sparse(),
        [[1.0], 2.0, 3.0], {"a": 1}, None, "abc", [None] * 3, [object()] * 3,
    )[number]  # fmt: skip
    with pytest.raises(InputError, match=r"returned .*, not numbers; return one finite number for each response"):
        scores(lambda prompts, responses: returned)


@pytest.mark.parametrize("number", range(4))
def test_other_tensors_are_read(number: int) -> None:
    returned = (
        torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.int8),
        [True] * 3,
    )[number]  # fmt: skip
    assert scores(lambda prompts, responses: returned) == [1.0] * 3
