"""Rows of every task: found in their usual columns, accounted for, and with what belongs to the task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config
from detoxrl.config.tasks import TASKS, TaskName
from detoxrl.data.embedded.corpus import generate_rows
from detoxrl.data.embedded.phrases import insult_pattern
from detoxrl.data.rows import Row, quality_references, read_rows, rows_to_jsonl, to_prompts
from detoxrl.data.selection import select
from detoxrl.data.sources import read_source
from detoxrl.errors import InputError
from detoxrl.evaluation.metrics import quality_measure, response_metrics, validation_quality
from detoxrl.models.chat import Message
from test_data import dialogue, write


def config(task: str, source: Path | str = "given", **settings: Any) -> Config:
    small = {"rl.algorithm": "ppo", "rl.batch_size": 2, "rl.minibatch_size": 2}
    return recipe("own", {"data.task": task, "data.source": str(source), **small, **settings})


def read(path: Path, task: str, rows: list[dict[str, Any]], **settings: Any) -> list[Row]:
    return read_source(config(task, write(path / "a.jsonl", rows), **settings))["file"]


@pytest.mark.parametrize(
    ("task", "record", "text", "references"),
    [
        ("summarize", {"dialogue": "A: Hi.", "summary": "They greet."}, "A: Hi.", ("They greet.",)),
        ("summarize", {"dialogue": "A: Hi."}, "A: Hi.", ()),
        ("continue", {"prompt": "The dog", "continuation": " ran."}, "The dog", (" ran.",)),
        ("continue", {"text": "The dog", "label": 1}, "The dog", ()),
        ("rewrite", {"source": "Get lost.", "target": "Please go."}, "Get lost.", ("Please go.",)),
        ("rewrite", {"source": "Get lost."}, "Get lost.", ()),
        ("chat", {"prompt": "Hi there"}, "User: Hi there", ()),
    ],
)
def test_a_task_finds_its_usual_columns(
    tmp_path: Path, task: TaskName, record: dict[str, Any], text: str, references: tuple[str, ...]
) -> None:
    first, *_ = read(tmp_path, task, [record, record])
    assert (first.text, first.references, first.task) == (text, references, task)
    civil = references if task == "rewrite" else ()
    assert first.civil_references == civil


USER = {"role": "user", "content": "You clown!"}
REPLY = {"role": "assistant", "content": "I am sorry."}


@pytest.mark.parametrize(
    ("record", "messages", "references"),
    [
        ({"messages": [USER]}, [USER], ()),
        ({"messages": [USER, REPLY]}, [USER], ("I am sorry.",)),
        ({"messages": [USER, REPLY, USER]}, [USER, REPLY, USER], ()),
        ({"prompt": [USER], "completion": [REPLY]}, [USER], ("I am sorry.",)),
        ({"prompt": [USER], "completion": "Sorry."}, [USER], ("Sorry.",)),
    ],
)
def test_conversations_are_read_as_trl_and_the_hub_have_them(
    tmp_path: Path, record: dict[str, Any], messages: list[dict[str, str]], references: tuple[str, ...]
) -> None:
    first, *_ = read(tmp_path, "chat", [record, record])
    assert first.messages == tuple(Message(**message) for message in messages)
    assert first.references == references


def test_a_conversation_without_a_message_to_reply_to_is_counted(tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": dialogue(i)}] for i in range(20)]
    bad: list[Any] = [[], [REPLY], [{"role": "user", "content": " "}], [USER, REPLY, REPLY], None]
    rows = read(tmp_path, "chat", [{"messages": talk} for talk in talks + bad])
    outcomes = select({"train": rows}, config("chat"), lambda texts: [len(text) for text in texts]).outcomes
    assert outcomes["train"]["no message to reply to"] == len(bad)
    assert sum(outcomes["train"].values()) == len(rows)


@pytest.mark.parametrize(
    ("task", "record", "settings", "message"),
    [
        ("continue", {"prompt": {"text": "a", "toxicity": 0.1}}, {},
         r"data\.text_column = 'prompt': contains dict, not text, in row 1 of file; name a field of it.* prompt\.text"),
        ("continue", {"prompt": [USER]}, {}, r"data\.text_column = 'prompt': contains list.*; use --data\.task chat"),
        ("rewrite", {"dialogue": "a"}, {}, r"data\.text_column = None: is source or text by default for data\.task"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, {}, r"contains the role 'tool' in message 1 of row"),
        ("continue", {"prompt": "a", "t": 3}, {"data.toxicity_column": "t"},
         r"data\.toxicity_column = 't': contains 3 in row 1 of file, and toxicity lies in \[0, 1\]"),
        ("continue", {"prompt": "a", "t": "x"}, {"data.toxicity_column": "t"}, r"contains 'x' in row 1 of file"),
        ("continue", {"prompt": "a"}, {"data.toxicity_column": "t.x"}, r"data\.toxicity_column = 't\.x': is not a col"),
        ("rewrite", {"source": "a"}, {"sft.steps": 3, "sft.full_weights": False},
         r"data\.reference_column = None: leaves sft nothing to learn from: .* has no column target; choose from sou"),
    ],
)  # fmt: skip
def test_a_column_that_does_not_fit_the_task_is_one_line(
    tmp_path: Path, task: str, record: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path, task, [record, record], **settings)
    assert "\n" not in str(raised.value)


def test_a_toxicity_without_a_column_of_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.min_toxicity = 0\.3: needs the toxicity of the prompts; name data\.t"):
        config("continue", **{"data.min_toxicity": 0.3})


def test_nested_columns_are_read_and_the_other_columns_travel(tmp_path: Path) -> None:
    record = {"prompt": {"text": "The dog", "toxicity": 0.7}, "filename": "f", "bits": [1, {"a": None}]}
    settings = {"data.text_column": "prompt.text", "data.toxicity_column": "prompt.toxicity"}
    row, _ = read(tmp_path, "continue", [record, {"prompt": {"text": "x", "toxicity": None}}], **settings)
    assert (row.text, row.toxicity) == ("The dog", 0.7)
    assert row.columns == record
    (prompt,) = to_prompts([row])
    assert prompt.columns == {
        **record, "id": "file_0", "text": "The dog", "references": [],
        "messages": [], "toxicity": 0.7,
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(rows_to_jsonl([row]), encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl") == [row]


# Selection


def by_characters(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def test_rows_with_one_text_are_one_row_with_several_references(tmp_path: Path) -> None:
    records = [{"source": dialogue(i), "target": f"t{i}{j}"} for i in range(12) for j in range(3)]
    records += [records[0], {"source": dialogue(0).upper(), "target": "t00"}, {"source": dialogue(40), "target": ""}]
    rows = read(tmp_path, "rewrite", records)
    selection = select({"train": rows}, config("rewrite"), by_characters)
    counts = selection.outcomes["train"]
    assert counts["further reference of a row"] == 24
    assert counts["duplicate"] == 2
    assert sum(counts.values()) == len(rows)
    used = [row for split in selection.rows.values() for row in split]
    assert sorted(row.references for row in used) == sorted(
        [*((f"t{i}0", f"t{i}1", f"t{i}2") for i in range(12)), ()]  # A target is optional.
    )
    assert all(row.civil_references == row.references for row in used)


def test_a_response_is_compared_with_the_reference_that_it_resembles_most() -> None:
    row = Row(id="a", text="x", references=("The dog ran home.", "A cat slept."), task="rewrite")
    assert response_metrics(row, "A cat slept.")["rouge_l"] == 1.0
    assert response_metrics(row, "The dog ran home.")["chrf"] == 1.0


def toxic_rows(count: int, toxic: int) -> list[Row]:
    return [
        Row(id=f"r{i}", text=dialogue(i), toxicity=0.9 if i < toxic else 0.1, task="continue") for i in range(count)
    ]


def test_held_out_prompts_are_half_toxic_and_civil_prompts_do_not_train() -> None:
    settings = {"data.toxicity_column": "t", "data.min_toxicity": 0.3, "evaluation.prompts": 20}
    rows = [*toxic_rows(120, 40), Row(id="none", text=dialogue(500), task="continue")]
    selection = select({"train": rows}, config("continue", **settings), by_characters)
    assert sum((row.toxicity or 0) >= 0.5 for row in selection.rows["test"]) == 10
    assert len(selection.rows["test"]) == 20
    assert all((row.toxicity or 0) >= 0.3 for row in selection.rows["train"])
    counts = selection.outcomes["train"]
    assert counts["no toxicity"] == 1
    assert counts["below data.min_toxicity"] > 50
    assert sum(counts.values()) == len(rows)

    given = {"train": toxic_rows(30, 30), "test": [replace(row, text=row.text + " x y z") for row in toxic_rows(99, 9)]}
    given["test"] = [replace(row, text=dialogue(200 + i)) for i, row in enumerate(given["test"])]
    selection = select(given, config("continue", **settings), by_characters)
    assert sum((row.toxicity or 0) >= 0.5 for row in selection.rows["test"]) == 9  # There are no more.
    assert len(selection.rows["test"]) == 20


# What differs by task


def test_only_a_continuation_may_run_to_its_end_without_a_penalty() -> None:
    assert {task: config(task).missing_eos_penalty for task in TASKS} == {
        "summarize": 1.0, "continue": 0.0, "chat": 1.0, "rewrite": 1.0,
    }  # fmt: skip
    assert config("continue", **{"reward.missing_eos_penalty": 0.5}).missing_eos_penalty == 0.5


def test_quality_is_that_of_the_task() -> None:
    texts = ["a b c", "a b d", "x y"]
    open_ended = [Row(id=str(i), text="t", references=("r",), task="continue") for i in range(3)]
    assert quality_references(open_ended[0]) == ()
    assert quality_measure(open_ended) == "corpus_distinct_2"
    assert validation_quality(open_ended, texts) == pytest.approx(4 / 5)  # a b, b c, a b, b d, x y
    assert "rouge_l" not in response_metrics(open_ended[0], "r")

    sources = [Row(id=str(i), text=text, task="rewrite") for i, text in enumerate(texts)]
    assert quality_measure(sources) == "source_chrf"
    assert validation_quality(sources, texts) == pytest.approx(1.0)
    assert validation_quality(sources, ["q", "q", "q"]) < 0.1
    assert quality_measure([replace(row, references=("r",)) for row in sources]) == "rouge_l"
    assert quality_measure([replace(row, task="summarize") for row in sources]) == "share with text"


@pytest.mark.parametrize("task", TASKS)
def test_the_embedded_corpus_has_rows_of_every_task(task: TaskName) -> None:
    rows = generate_rows(0, {"train": 200, "test": 50}, task)
    insult = insult_pattern()
    for row in [*rows["train"], *rows["test"]]:
        assert row.task == task
        assert row.text
        assert row.references
        assert not any(insult.search(reference) for reference in row.civil_references)
    rude = [row for row in rows["train"] if insult.search(row.text)]
    assert 0.6 < len(rude) / 200 < 0.95
    if task == "chat":
        for row in rows["train"]:
            assert row.messages[0].role == row.messages[-1].role == "user"
            assert bool(insult.search(row.text)) == bool(insult.search(row.messages[-1].content))
    if task == "continue":
        assert all(row.text.rpartition("\n")[2] in ("#Person1#:", "#Person2#:") for row in rows["train"])
    assert generate_rows(0, {"train": 200, "test": 50}, task) == rows


def test_a_template_may_be_changed_and_has_to_hold_the_text() -> None:
    with pytest.raises(InputError, match=r"data\.template = 'Sum up \{dialogue\}': must contain \{source\}"):
        config("rewrite", **{"data.template": "Sum up {dialogue}"})
    assert config("rewrite", **{"data.template": "Kindly: {source}"}).template == "Kindly: {source}"
    assert json.dumps(config("rewrite").template) == json.dumps(TASKS["rewrite"].template)
