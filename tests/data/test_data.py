"""A user's rows: read unchanged, all accounted for, and never in two splits."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config
from detoxrl.data.duplicates import THRESHOLD, candidates, near_duplicate_groups, sets_of, shingles
from detoxrl.data.layout import require_usable_source
from detoxrl.data.prompts import PromptWriter, token_lengths
from detoxrl.data.rows import Row
from detoxrl.data.selection import Selection, select
from detoxrl.data.sources import read_source
from detoxrl.errors import InputError
from detoxrl.models.loading import load_tokenizer

ODD = "“Curly” café 😀👩‍👩‍👧\r\nBob: \u2028 tab\there, NA? #Person1#: {dialogue}"
TOPICS = [
    *("lamp", "parcel", "soup", "garden", "ticket", "bicycle", "kettle", "letter", "window", "carpet"),
    *("pillow", "candle", "basket", "hammer", "ladder", "mirror", "blanket", "saucer", "bottle", "pencil"),
]


ONE = '{"talk": "a", "gist": "b"}\n'


def dialogue(i: int, tail: str = "") -> str:
    """Return a dialogue of 20 words that shares no trigram with the dialogue of another number."""
    words = [f"{topic}{i}" for topic in TOPICS]
    return f"Ann: {' '.join(words[:10])}?\nBob: {' '.join(words[10:])}.{tail}"


def records(count: int) -> list[dict[str, Any]]:
    return [{"key": f"k{i}", "talk": dialogue(i), "gist": f"They talk about {i}."} for i in range(count)]


def config(source: Path | str = "given", **data: Any) -> Config:
    own = recipe("own", {"data.source": str(source), "rl.algorithm": "ppo", "rl.batch_size": 2, "rl.minibatch_size": 2})
    columns = {"text_column": "talk", "reference_column": "gist"}
    return replace(own, data=replace(own.data, **columns | data))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_rows_unchanged(tmp_path: Path, name: str) -> None:
    rows = [{"key": 7, "talk": ODD, "gist": "None"}, {"key": 8, "talk": "x" * 5000, "gist": "NA"}]
    read = read_source(config(write(tmp_path / name, rows), id_column="key"))["file"]
    assert [(row.id, row.text, row.references) for row in read] == [("7", ODD, ("None",)), ("8", "x" * 5000, ("NA",))]
    assert [row.columns["talk"] for row in read] == [ODD, "x" * 5000]


def test_a_folder_keeps_its_splits_and_rows_are_numbered(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.jsonl", records(2))
    read = read_source(config(tmp_path))
    assert set(read) == {"train", "dev", "test"}
    assert [row.id for row in read["test"]] == ["test_0", "test_1"]


def test_without_a_reference_column_rows_have_none(tmp_path: Path) -> None:
    read = read_source(config(write(tmp_path / "a.jsonl", records(2)), reference_column=None))
    assert [row.references for row in read["file"]] == [(), ()]


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.jsonl", None, {}, r"data\.source = '.*a\.jsonl': is not a file; .* contains b\.csv"),
        ("a.jsonl", "", {}, r"contains no rows; give a file with rows"),
        ("a.jsonl", '{"talk": oops}', {}, r"cannot be read: row 1: Expecting value: .*; give UTF-8 text"),
        ("a.jsonl", b'{"talk": "caf\xe9", "gist": "x"}', {}, r"cannot be read: line 1 is not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", ONE, {"text_column": "text"},
         r"data\.text_column = 'text': is not a column .*choose from talk, gist"),
        ("a.jsonl", ONE, {"reference_column": "s"},
         r"data\.reference_column = 's': is not a column of .*; choose from talk, gist"),
        ("a.jsonl", ONE, {"id_column": "i"}, r"data\.id_column = 'i': is not a column"),
        ("a.jsonl", '{"talk": ["a"], "gist": "b"}', {},
         r"data\.text_column = 'talk': contains list, not text, in row 1 of file"),
        ("a.jsonl", '{"talk": "a", "gist": 3}', {},
         r"data\.reference_column = 'gist': contains int, not text, in row 1 of file"),
        ("a.jsonl", ONE + ONE, {"id_column": "gist"}, r"data\.id_column = 'gist': has 'b' in 2 rows of file"),
        ("a.txt", "x", {}, r"has an unknown format; give one of .*\.parquet"),
        ("a.csv", "talk,gist\nhi, there,x\n", {}, r"line 2: 3 fields under 2 columns"),
        ("a.csv", "talk,gist\nhi,x,\n", {}, r"line 2: 3 fields under 2 columns"),
        ("a.csv", 'talk,gist\n"hi,x\n', {}, r"cannot be read: unexpected end of data"),
        ("a.csv", "talk;gist\nhi;x\n", {}, r"data\.text_column = 'talk': is not a column .*choose from talk;gist"),
        ("a.json", "3", {}, r"row 1: expected an object, not int"),
        ("a.jsonl.gz", gzip.compress(ONE.encode() * 99, mtime=0)[:40], {}, r"cannot be read: Compressed file ended"),
        ("a.parquet", "no parquet", {}, r"cannot be read: .*[Pp]arquet"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line_with_a_remedy(
    tmp_path: Path, name: str, content: str | bytes | None, settings: dict[str, str], message: str
) -> None:
    (tmp_path / "b.csv").write_text("x\n1\n")
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as raised:
        read_source(config(tmp_path / name, **settings))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_whether_a_source_can_be_used_is_known_from_its_first_rows(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [{"key": 1, "talk": "a", "gist": ""}, {"key": 2, "talk": "b", "gist": "c"}]
    path = write(tmp_path / name, rows)
    torn = gzip.compress(gzip.decompress(path.read_bytes()) + b"{oops") if name.endswith("gz") else b'"oops'
    with path.open("ab" if not name.endswith("gz") else "wb") as file:
        file.write(torn)
    require_usable_source(config(path))
    with pytest.raises(InputError, match=r"cannot be read: "):  # To name the columns that there are, it is read whole.
        require_usable_source(config(path, id_column="number"))
    with pytest.raises(InputError, match=r"cannot be read: "):
        read_source(config(path))


def test_a_column_that_only_later_rows_have_is_found(tmp_path: Path) -> None:
    for names in (("a.jsonl",), ("train.jsonl", "test.jsonl")):
        folder = tmp_path / str(len(names))
        folder.mkdir()
        write(folder / names[0], [{"talk": "a"}])
        with pytest.raises(InputError, match=r"data\.reference_column = 'gist': .*; choose from talk"):
            require_usable_source(config(folder / names[0]))
        write(folder / names[-1], [{"talk": "a"}, {"talk": "b", "gist": "c"}])
        source = folder if len(names) > 1 else folder / names[0]
        require_usable_source(config(source))
        assert sum(map(len, read_source(config(source)).values())) == len(names) + 1


# Selection


def rows_of(texts: list[str], split: str = "train") -> list[Row]:
    return [Row(id=f"{split}_{i}", text=text, references=("s",)) for i, text in enumerate(texts)]


def select_rows(source: dict[str, list[Row]], settings: Config) -> Selection:
    """Select with lengths in characters; fail unless the outcomes account for every row."""
    selection = select(source, settings, lambda texts: [len(text) for text in texts])
    for split, rows in source.items():
        assert sum(selection.outcomes[split].values()) == len(rows), "a row is not accounted for"
    for role, rows in selection.rows.items():
        assert sum(counts.get(f"used for {role}", 0) for counts in selection.outcomes.values()) == len(rows)
    return selection


def test_each_row_that_is_left_out_is_counted_under_its_reason() -> None:
    texts = ["", " \n", "Ann: Hi.", dialogue(0), dialogue(0).upper().replace("\n", "  "), "y" * 999]
    source = {"train": rows_of([*texts, *map(dialogue, range(1, 13))]), "extra": rows_of(["a"])}
    source["train"][9] = replace(source["train"][9], references=())
    source["test"] = rows_of([dialogue(1), dialogue(20), dialogue(21)], "test")
    source["validation"] = rows_of([dialogue(2), dialogue(20, " Bye."), dialogue(22), dialogue(23)], "validation")
    selection = select_rows(source, config(min_length=20, max_length=900, limit=5))
    assert selection.outcomes == {
        "train": {
            "no dialogue": 2, "too short": 1, "too long": 1, "duplicate": 1, "no summary": 1, "leaks from test": 1,
            "leaks from validation": 1, "beyond data.limit": 5, "used for train": 5,
        },
        "validation": {"leaks from test": 1, "used for validation": 3},
        "test": {"used for test": 3},
        "extra": {"in a split that no stage uses": 1},
    }  # fmt: skip


def test_an_unsplit_file_is_split_by_seed_without_leaks() -> None:
    # Two near-duplicates follow every third dialogue.
    texts = [dialogue(i, tail) for i in range(90) for tail in (("", " Bye.", " Well, bye.") if i % 3 == 0 else ("",))]
    selection = select_rows({"train": rows_of(texts)}, config())
    assert [len(selection.rows[role]) for role in ("test", "validation")] == [30, 15]
    first_words = {role: {row.text.split()[1] for row in rows} for role, rows in selection.rows.items()}
    assert not first_words["train"] & first_words["test"]
    assert not first_words["train"] & first_words["validation"]
    assert not first_words["validation"] & first_words["test"]
    again = select_rows({"train": rows_of(texts)}, config())
    other = select_rows({"train": rows_of(texts)}, replace(config(), seed=1))
    assert again.rows == selection.rows
    assert other.rows["test"] != selection.rows["test"]


def test_a_missing_validation_split_is_drawn_from_training_and_dev_is_a_name_for_it() -> None:
    train = rows_of([dialogue(i) for i in range(50)])
    test = rows_of([dialogue(i) for i in range(60, 64)], "test")
    drawn = select_rows({"train": train, "test": test}, config())
    assert drawn.rows["test"] == test
    assert len(drawn.rows["validation"]) == 5
    dev = rows_of([dialogue(i) for i in range(70, 73)], "dev")
    assert select_rows({"train": train, "test": test, "dev": dev}, config()).rows["validation"] == dev


def test_a_limit_draws_rows_by_seed_and_keeps_their_order() -> None:
    rows = rows_of([dialogue(i) for i in range(40)])
    rest = {"test": rows_of([dialogue(i) for i in range(50, 60)]), "dev": rows_of([dialogue(i) for i in range(60, 63)])}
    settings = config(limit=10)
    selection = select_rows(
        {"train": rows} | rest, replace(settings, evaluation=replace(settings.evaluation, prompts=4))
    )
    numbers = [int(row.id.split("_")[1]) for row in selection.rows["train"]]
    assert len(numbers) == 10
    assert numbers == sorted(numbers) != list(range(10))
    assert selection.outcomes["test"] == {"beyond evaluation.prompts": 6, "used for test": 4}


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["", dialogue(1), dialogue(2), dialogue(3), "short"], {"min_length": 10},
         r"leaves 0 rows for train \(1 no dialogue, 1 too short\); add distinct rows, or relax"),
        ([dialogue(i) for i in range(9)], {"max_length": 3}, r"leaves 0 rows for train \(9 too long\)"),
    ],
)  # fmt: skip
def test_too_few_rows_are_refused_with_the_counts_of_each_reason(
    texts: list[str], settings: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        select_rows({"train": rows_of(texts)}, config(**settings))


def test_a_batch_larger_than_the_training_rows_is_refused() -> None:
    settings = config()
    settings = replace(settings, rl=replace(settings.rl, batch_size=64, minibatch_size=16))
    with pytest.raises(
        InputError, match=r"rl\.batch_size = 64: needs 64 prompts a step, and 14 rows are left for training \(no"
    ):
        select_rows({"train": rows_of([dialogue(i) for i in range(20)])}, settings)


def test_a_source_without_training_rows_is_refused() -> None:
    source = {name: rows_of([dialogue(0)]) for name in ("test", "dev")}
    with pytest.raises(InputError, match=r"has the splits test, dev, but not train"):
        select_rows(source, config())


# Near-duplicates


def slow_groups(texts: list[str]) -> list[set[int]]:
    """Return the groups of `near_duplicate_groups`, found by comparing all pairs."""
    groups = [{i} for i in range(len(texts))]
    for i in range(len(texts)):
        for j in range(i):
            a, b = shingles(texts[i]), shingles(texts[j])
            if len(a & b) >= THRESHOLD * len(a | b) and groups[i] is not groups[j]:
                groups[i] |= groups[j]
                for k in groups[j]:
                    groups[k] = groups[i]
    return groups


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=14).map(" ".join), max_size=14))
def test_groups_are_those_of_comparing_all_pairs(texts: list[str]) -> None:
    groups = near_duplicate_groups(texts)
    expected = slow_groups(texts)
    for i in range(len(texts)):
        assert {j for j in range(len(texts)) if groups[j] == groups[i]} == expected[i]


def test_a_dialogue_with_one_changed_word_is_a_near_duplicate_and_another_dialogue_is_not() -> None:
    changed = dialogue(0).replace("soup0", "stew")
    a, b, c = near_duplicate_groups([dialogue(0), changed, dialogue(1)])
    assert a == b != c


def test_texts_made_of_the_same_lines_are_compared_only_where_they_can_be_near() -> None:
    lines = [" ".join(f"word{(7 * line * line + 31 * k) % 97}" for k in range(9)) for line in range(30)]
    drawn = Random(0)
    texts = ["\n".join(drawn.sample(lines, 8)) for _ in range(300)]
    compared = sum(len(earlier) for _, earlier in candidates(sets_of([shingles(text) for text in texts])))
    assert 0 < compared < 300 * 299 / 2 / 20


def test_one_of_many_near_texts_speaks_for_the_others() -> None:
    texts = [f"{dialogue(0)} Well, {end}!" for end in "abcdefgh"]
    groups = near_duplicate_groups([dialogue(1), *texts, dialogue(2)])
    assert len(set(groups[1:-1])) == 1
    assert len(set(groups)) == 3


def test_no_texts_have_no_groups() -> None:
    assert near_duplicate_groups([]) == []


# Prompts


def test_a_long_dialogue_is_cut_at_its_end_between_words_and_the_template_is_kept(bases: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(bases["t5"]))
    settings = config(template="Sum up:\n{dialogue}\nSummary:", max_prompt_tokens=40)
    long = "#Person1#: You lost my parcel, you pig! " * 20
    rows = [Row(id="a", text=long, references=("s",)), Row(id="b", text="Hello.", references=("s",))]
    (cut, whole), lengths = PromptWriter(settings, tokenizer).with_prompts(rows)
    assert lengths[0] > 40 > lengths[1]
    assert token_lengths(tokenizer, [cut.prompt])[0] in range(30, 41)
    beginning = cut.prompt.removeprefix("Sum up:\n").removesuffix("\nSummary:")
    assert long.startswith(beginning)
    assert long[len(beginning)] == " "
    assert cut.text == long
    assert whole.prompt == "Sum up:\nHello.\nSummary:"


@pytest.mark.parametrize("limit", range(12, 30))
def test_a_cut_prompt_is_the_longest_that_fits_even_without_spaces(bases: dict[str, Path], limit: int) -> None:
    tokenizer = load_tokenizer(str(bases["t5"]))
    settings = config(template="{dialogue}", max_prompt_tokens=limit)
    text = "\n" + "abcdefgh" * 30  # Cutting at the only space would leave nothing.
    (row,), _ = PromptWriter(settings, tokenizer).with_prompts([Row(id="a", text=text)])
    assert token_lengths(tokenizer, [row.prompt])[0] <= limit
    assert token_lengths(tokenizer, [text[: len(row.prompt) + 1]])[0] > limit


def test_a_template_longer_than_the_limit_is_refused(bases: dict[str, Path]) -> None:
    writer = PromptWriter(config(max_prompt_tokens=3), load_tokenizer(str(bases["t5"])))
    with pytest.raises(InputError, match=r"data\.max_prompt_tokens = 3: is less than the \d+ tokens of row a without"):
        writer.with_prompts([Row(id="a", text="Hi.")])


def test_a_byte_order_mark_a_lone_surrogate_and_ids_that_look_like_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffkey,talk,gist\n007,1,2020-01-01\n7,true,x\n", encoding="utf-8")
    read = read_source(config(tmp_path / "a.csv", id_column="key"))["file"]
    assert [(row.id, row.text, row.references[0]) for row in read] == [("007", "1", "2020-01-01"), ("7", "true", "x")]
    (tmp_path / "a.JSONL").write_text('\ufeff{"talk": "a \\ud83d b", "gist": "c"}\n\n', encoding="utf-8")
    assert read_source(config(tmp_path / "a.JSONL"))["file"][0].text == "a ? b"


def test_a_folder_is_read_whole_or_the_file_without_a_split_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "f[1]"  # The brackets must not be read as a glob pattern.
    folder.mkdir()
    write(folder / "train.csv", [{"talk": "None", "gist": "NA"}])
    write(folder / "my-test-v2.jsonl", records(2))
    (folder / "notes.txt").write_text("no data")
    read = read_source(config(folder))
    assert {split: len(rows) for split, rows in read.items()} == {"train": 1, "test": 2}
    assert read["train"][0].text == "None"
    for name in ("latest.jsonl", "test.json"):
        write(folder / name, records(1))
        with pytest.raises(InputError, match=rf"contains (my-test-v2.jsonl|{name}), but the name fits no single"):
            read_source(config(folder))
        (folder / name).unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no data file; add \.csv, \.json"):
        read_source(config(tmp_path / "empty"))


def test_two_splits_of_one_role_are_both_used() -> None:
    numbers = {"train": range(9), "dev": range(20, 22), "valid": range(40, 41), "test": range(30, 32)}
    source = {name: rows_of([dialogue(i) for i in split_numbers], name) for name, split_numbers in numbers.items()}
    assert len(select_rows(source, config()).rows["validation"]) == 3


def test_the_caller_decides_what_a_length_counts() -> None:
    rows = rows_of([dialogue(i) for i in range(30)] + [dialogue(99) + " word" * 9])
    selection = select({"train": rows}, config(max_length=25), lambda texts: [len(text.split()) for text in texts])
    assert selection.outcomes["train"]["too long"] == 1


@pytest.mark.parametrize(
    ("a", "b", "near"),
    [
        ("甲：你好吗？今天天气很好，我们去公园吧。", "甲：你好吗？今天天气很好，我们去公园吧！", True),
        ("甲：你好吗？今天天气很好，我们去公园吧。", "乙：昨天我丢了钥匙，门打不开了，怎么办？", False),
        ("😀", "!!!", False),
    ],
)
def test_scripts_without_spaces_are_compared_by_character(a: str, b: str, near: bool) -> None:
    first, second = near_duplicate_groups([a, b])
    assert (first == second) is near


def test_texts_of_fewer_than_three_words_are_compared_whole() -> None:
    a, b, c = near_duplicate_groups(["Hello there", "Hello, there!", "Good bye"])
    assert a == b != c
