"""Toxic turns in clean rows: which turn, where, in whose mouth, and on which side of the split."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detoxrl.config.recipes import recipe
from detoxrl.data.conversations import as_text
from detoxrl.data.embedded.corpus import generate_rows
from detoxrl.data.embedded.facts import facts_kept
from detoxrl.data.rows import SPLITS, Row, read_rows, rows_to_jsonl
from detoxrl.data.stress import with_stress
from detoxrl.data.stress_lines import stress_lines
from detoxrl.errors import InputError
from detoxrl.evaluation.compare import parts_by_prompt
from detoxrl.models.chat import Message

TURN = "You are an idiot!"
INSULTS = [f"You are idiot number {i}." for i in range(60)]


def stressed(row: Row, turn: str = TURN, split: str = "test") -> Row:
    """The row with the turn, under the first id that gets one."""
    for number in range(40):
        found = with_stress([replace(row, id=str(number))], [turn], split, seed=0)
        if found.turns != [None] or found.without_place:
            return found.rows[0]
    raise AssertionError("no row was stressed")


def variants(row: Row) -> set[str]:
    """All texts that the row has under many ids."""
    rows = [replace(row, id=str(number)) for number in range(200)]
    return {changed.text for changed in with_stress(rows, [TURN], "test", seed=0).rows if changed.stressed}


# The place of a turn


def test_a_turn_stands_behind_any_turn_of_a_dialogue_in_the_mouth_of_any_of_its_speakers() -> None:
    row = Row(id="a", text="Ann: Hi.\nBob: Hello.\nIt is me.\nAnn: Bye.")
    lines = row.text.split("\n")
    expected = set()
    for number in (1, 3, 4):  # "It is me." belongs to Bob's turn
        for speaker in ("Ann", "Bob"):
            expected.add("\n".join([*lines[:number], f"{speaker}: {TURN}", *lines[number:]]))
    assert variants(row) == expected


def test_a_dialogue_keeps_its_line_ends() -> None:
    texts = variants(Row(id="a", text="Ann: Hi.\r\nBob: Hello."))
    assert f"Ann: Hi.\r\nBob: {TURN}\r\nBob: Hello." in texts
    assert f"Ann: Hi.\r\nBob: Hello.\r\nAnn: {TURN}" in texts
    assert len(texts) == 4


@pytest.mark.parametrize("text", ["A report without speakers.", "One line: no dialogue.", "At 10:30\nhttp://x", ""])
def test_a_text_without_turns_stays_as_it_is_and_is_counted(text: str) -> None:
    rows = [Row(id=str(number), text=text) for number in range(100)]
    found = with_stress(rows, [TURN], "test", seed=0)
    assert found.rows == rows
    assert found.turns == [None] * 100
    assert 35 <= found.without_place <= 65


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He went out. Then she", f"He went out. {TURN} Then she"),
        ("He went over and", f"{TURN} He went over and"),
        ("Is it? Yes. No. It", f"Is it? Yes. No. {TURN} It"),
        ("First line.\nSecond line and", f"First line.\n{TURN}\nSecond line and"),
        # Two speakers: the one who does not speak next says it, before the turn that is to be continued.
        ("Ann: Hi.\nBob: Hello.\nAnn:", f"Ann: Hi.\nBob: Hello.\nBob: {TURN}\nAnn:"),
        ("Ann: Hi.\nAnn: Well", f"Ann: Hi.\nAnn: {TURN}\nAnn: Well"),
    ],
)
def test_a_text_to_continue_has_it_before_what_is_continued(text: str, expected: str) -> None:
    assert variants(Row(id="a", text=text, task="continue")) == {expected}


def test_a_turn_without_an_end_is_a_sentence_of_its_own_in_running_text() -> None:
    assert stressed(Row(id="a", text="It was", task="continue"), "you idiot").text == "you idiot. It was"


def test_a_conversation_has_it_at_the_beginning_of_one_of_the_users_messages() -> None:
    messages = (
        Message("system", "Be kind."), Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "Why?"),
    )  # fmt: skip
    row = Row(id="a", text=as_text(messages[1:]), messages=messages, task="chat")
    rows = [replace(row, id=str(number)) for number in range(100)]
    changed = [row for row in with_stress(rows, [TURN], "test", seed=0).rows if row.stressed]
    contents = {tuple(message.content for message in row.messages) for row in changed}
    assert contents == {
        ("Be kind.", f"{TURN}\nHi.", "Hello.", "Why?"),
        ("Be kind.", "Hi.", "Hello.", f"{TURN}\nWhy?"),
    }
    for row in changed:
        assert [message.role for message in row.messages] == ["system", "user", "assistant", "user"]
        assert row.text == as_text(row.messages[1:])


# Which rows, which turns


def test_half_of_the_rows_are_stressed_and_seed_split_and_id_decide_which() -> None:
    rows = generate_rows(0, {"test": 400})["test"]
    found = with_stress(rows, INSULTS, "test", seed=0)
    chosen = [row.id for row in found.rows if row.stressed]
    assert 170 <= len(chosen) <= 230
    assert len({turn for turn in found.turns if turn}) > 50
    for row, changed, turn in zip(rows, found.rows, found.turns, strict=True):
        assert changed.stressed == (turn is not None)
        if turn is None:
            assert changed == row
        else:
            (line,) = set(changed.text.split("\n")) - set(row.text.split("\n"))
            assert line in (f"#Person1#: {turn}", f"#Person2#: {turn}")

    again = with_stress(rows[200:], INSULTS, "test", seed=0)
    assert again.rows == found.rows[200:]
    for other in (with_stress(rows, INSULTS, "test", seed=1), with_stress(rows, INSULTS, "train", seed=0)):
        assert [row.id for row in other.rows if row.stressed] != chosen


def test_what_is_known_of_a_generated_row_stays_true() -> None:
    for row in with_stress(generate_rows(0, {"test": 50})["test"], INSULTS, "test", seed=0).rows:
        assert row.facts is not None
        assert facts_kept(row.civil_references[0], row.facts) == 1
        assert row.text.startswith("#Person1#: ")


def test_a_row_remembers_its_turn_in_the_run_folder(tmp_path: Path) -> None:
    rows = with_stress(generate_rows(0, {"test": 20})["test"], INSULTS, "test", seed=0).rows
    (tmp_path / "rows.jsonl").write_text(rows_to_jsonl(rows))
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert {row.stressed for row in rows} == {True, False}


def test_stressed_and_clean_prompts_are_parts_also_beside_toxic_ones() -> None:
    rows = [Row(id=str(i), text="x", stressed=i < 2, toxicity=0.9 if i % 2 else 0.1) for i in range(5)]
    masks = {name: mask.tolist() for name, mask in parts_by_prompt(rows).items()}
    stress = [True, True, False, False, False]
    assert masks["stressed prompts"] == stress
    assert masks["clean prompts"] == np.invert(stress).tolist()
    assert masks["toxic prompts"] == [False, True, False, True, False]
    assert set(masks) == {"stressed prompts", "clean prompts", "toxic prompts", "other prompts"}
    assert parts_by_prompt([replace(row, stressed=False, toxicity=None) for row in rows]) == {}


# The file


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_turn_belongs_to_one_split_whatever_its_case_and_punctuation(tmp_path: Path) -> None:
    plain = stress_lines(write(tmp_path / "a.txt", "\n".join(INSULTS)))
    assert set(plain) == set(SPLITS)
    assert sorted(chain(*plain.values())) == sorted(INSULTS)
    assert len(plain["train"]) > len(plain["test"]) >= 3

    shouted = stress_lines(write(tmp_path / "b.txt", "\n".join(line.upper() + "!" for line in INSULTS)))
    for split in SPLITS:
        assert [line.upper() + "!" for line in plain[split]] == shouted[split]
    twice = stress_lines(write(tmp_path / "c.txt", "\n".join([*INSULTS, *(line.upper() for line in INSULTS)])))
    assert twice == plain


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_data_file_has_its_turns_in_the_column_text(name: str, tmp_path: Path) -> None:
    rows = [f'"{line}",1' if name == "a.csv" else json.dumps({"text": line, "n": 1}) for line in INSULTS]
    header = ["text,n"] if name == "a.csv" else []
    found = stress_lines(write(tmp_path / name, "\n".join([*header, *rows])))
    assert found == stress_lines(write(tmp_path / "a.txt", "\n".join(INSULTS)))


def test_a_turn_of_several_lines_becomes_one_line(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"You\n  idiot {i}"}) for i in range(40)]
    found = stress_lines(write(tmp_path / "a.jsonl", "\n".join(rows)))
    assert all(turn.startswith("You idiot ") for turn in chain(*found.values()))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"is empty; give one text per line"),
        ("a.txt", "You idiot.\n\nYou fool.", r"has no words in turn 2; leave it out"),
        ("a.txt", "You idiot.\n!!!", r"has no words in turn 2"),
        ("a.txt", "\n".join(INSULTS[:4]), r"has \d of its 4 distinct turns for \w+, and 3 are needed; add turns; by"),
        ("a.csv", "turn\nYou idiot.", r"has no column 'text'; call the column of the turns text"),
        ("a.jsonl", '{"text": ["You idiot."]}', r"'text': contains list, not text, in row 1"),
        ("a.jsonl", "{", r"cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as raised:
        stress_lines(write(tmp_path / name, text))
    assert str(raised.value).startswith("data.stress = ")
    assert "idiot" not in str(raised.value)


def test_a_file_that_is_not_there_names_those_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "turns.txt", "x")
    for path in (tmp_path / "turn.txt", tmp_path):
        with pytest.raises(InputError, match=r"data\.stress = .*is not a file; .*turns\.txt"):
            stress_lines(path)


def test_sources_to_rewrite_have_no_speakers() -> None:
    settings: dict[str, Any] = {"data.task": "rewrite", "data.stress": "x.txt"}
    with pytest.raises(InputError, match=r"data\.stress = 'x\.txt': cannot be combined with data\.task = rewrite, who"):
        recipe("own", settings)
