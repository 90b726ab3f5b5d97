"""A user's rows: read as they are, every one accounted for, never on two sides."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config, DataConfig
from detoxrl.data.duplicates import THRESHOLD, near_duplicate_groups, shingles
from detoxrl.data.rows import Row, token_lengths, with_prompts
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
    """A dialogue of about 30 words that shares no trigram with another number's."""
    words = [f"{topic}{i}" for topic in TOPICS]
    return f"Ann: {' '.join(words[:10])}?\nBob: {' '.join(words[10:])}.{tail}"


def records(count: int) -> list[dict[str, Any]]:
    return [{"key": f"k{i}", "talk": dialogue(i), "gist": f"They talk about {i}."} for i in range(count)]


def config(source: Path | str = "given", **data: Any) -> Config:
    own = recipe("own", {"data.source": str(source), "rl.batch_size": 2, "rl.minibatch_size": 2})
    columns = {"dialogue_column": "talk", "summary_column": "gist"}
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
def test_every_format_gives_the_same_rows_unharmed(tmp_path: Path, name: str) -> None:
    rows = [{"key": 7, "talk": ODD, "gist": "None"}, {"key": 8, "talk": "x" * 5000, "gist": "NA"}]
    found = read_source(config(write(tmp_path / name, rows), id_column="key").data)
    assert found == {
        "file": [Row(id="7", dialogue=ODD, summary="None"), Row(id="8", dialogue="x" * 5000, summary="NA")]
    }


def test_a_folder_keeps_its_splits_and_rows_are_numbered(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.jsonl", records(2))
    found = read_source(config(tmp_path).data)
    assert set(found) == {"train", "dev", "test"}
    assert [row.id for row in found["test"]] == ["test_0", "test_1"]


def test_without_a_summary_column_rows_have_none(tmp_path: Path) -> None:
    found = read_source(config(write(tmp_path / "a.jsonl", records(2)), summary_column=None).data)
    assert [row.summary for row in found["file"]] == [None, None]


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.jsonl", None, {}, r"data\.source = '.*a\.jsonl': is no file; .* holds b\.csv"),
        ("a.jsonl", "", {}, r"holds no rows; give a file with rows"),
        ("a.jsonl", '{"talk": oops}', {}, r"cannot be read: row 1: Expecting value: .*; give UTF-8 text"),
        ("a.jsonl", b'{"talk": "caf\xe9", "gist": "x"}', {}, r"cannot be read: 'utf-8' codec can't decode"),
        ("a.jsonl", ONE, {"dialogue_column": "text"},
         r"data\.dialogue_column = 'text': is no column .*choose from talk, gist"),
        ("a.jsonl", ONE, {"summary_column": "s"}, r"data\.summary_column = 's': .*or say None and --sft\.steps 0"),
        ("a.jsonl", ONE, {"id_column": "i"}, r"data\.id_column = 'i': is no column"),
        ("a.jsonl", '{"talk": ["a"], "gist": "b"}', {},
         r"data\.dialogue_column = 'talk': holds list, not text, in row 1 of file"),
        ("a.jsonl", '{"talk": "a", "gist": 3}', {},
         r"data\.summary_column = 'gist': holds int, not text, in row 1 of file"),
        ("a.jsonl", ONE + ONE, {"id_column": "gist"}, r"data\.id_column = 'gist': names 2 rows of file 'b'"),
        ("a.txt", "x", {}, r"is of no known format; give one of .*\.parquet"),
        ("a.csv", "talk,gist\nhi, there,x\n", {}, r"line 2: 3 fields under 2 columns"),
        ("a.csv", "talk,gist\nhi,x,\n", {}, r"line 2: 3 fields under 2 columns"),
        ("a.csv", 'talk,gist\n"hi,x\n', {}, r"cannot be read: unexpected end of data"),
        ("a.csv", "talk;gist\nhi;x\n", {}, r"data\.dialogue_column = 'talk': is no column .*choose from talk;gist"),
        ("a.json", "3", {}, r"row 1: int where an object belongs"),
        ("a.jsonl.gz", gzip.compress(ONE.encode() * 99, mtime=0)[:40], {}, r"cannot be read: Compressed file ended"),
        ("a.parquet", "no parquet", {}, r"cannot be read: .*[Pp]arquet"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named_with_what_is_there(
    tmp_path: Path, name: str, content: str | bytes | None, settings: dict[str, str], message: str
) -> None:
    (tmp_path / "b.csv").write_text("x\n1\n")
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as raised:
        read_source(config(tmp_path / name, **settings).data)
    assert "\n" not in str(raised.value)


# Selection


def rows_of(texts: list[str], split: str = "train") -> list[Row]:
    return [Row(id=f"{split}_{i}", dialogue=text, summary="s") for i, text in enumerate(texts)]


def chosen(source: dict[str, list[Row]], asked: Config) -> Selection:
    found = select(source, asked, lambda texts: [len(text) for text in texts])
    for split, rows in source.items():
        assert sum(found.outcomes[split].values()) == len(rows), "a row is not accounted for"
    for role, rows in found.rows.items():
        assert sum(counts.get(f"used for {role}", 0) for counts in found.outcomes.values()) == len(rows)
    return found


def test_each_row_left_out_is_counted_under_its_reason() -> None:
    texts = ["", " \n", "Ann: Hi.", dialogue(0), dialogue(0).upper().replace("\n", "  "), "y" * 999]
    source = {"train": rows_of([*texts, *map(dialogue, range(1, 13))]), "extra": rows_of(["a"])}
    source["train"][9] = replace(source["train"][9], summary=" ")
    source["test"] = rows_of([dialogue(1), dialogue(20), dialogue(21)], "test")
    source["validation"] = rows_of([dialogue(2), dialogue(20, " Bye."), dialogue(22), dialogue(23)], "validation")
    found = chosen(source, config(min_length=20, max_length=900, limit=5))
    assert found.outcomes == {
        "train": {
            "no dialogue": 2, "too short": 1, "too long": 1, "duplicate": 1, "no summary": 1, "leaks from test": 1,
            "leaks from validation": 1, "beyond data.limit": 5, "used for train": 5,
        },
        "validation": {"leaks from test": 1, "used for validation": 3},
        "test": {"used for test": 3},
        "extra": {"in a split that no stage uses": 1},
    }  # fmt: skip


def test_an_unsplit_file_is_split_by_seed_without_leaks() -> None:
    # Every third dialogue comes twice more, nearly the same.
    texts = [dialogue(i, tail) for i in range(90) for tail in (("", " Bye.", " Well, bye.") if i % 3 == 0 else ("",))]
    found = chosen({"train": rows_of(texts)}, config())
    assert [len(found.rows[role]) for role in ("test", "validation")] == [30, 15]
    sides = {role: {row.dialogue.split()[1] for row in rows} for role, rows in found.rows.items()}
    assert not sides["train"] & sides["test"]
    assert not sides["train"] & sides["validation"]
    assert not sides["validation"] & sides["test"]
    again = chosen({"train": rows_of(texts)}, config())
    other = chosen({"train": rows_of(texts)}, replace(config(), seed=1))
    assert again.rows == found.rows
    assert other.rows["test"] != found.rows["test"]


def test_a_missing_validation_split_is_taken_from_training_and_its_other_names_are_known() -> None:
    train = rows_of([dialogue(i) for i in range(50)])
    test = rows_of([dialogue(i) for i in range(60, 64)], "test")
    carved = chosen({"train": train, "test": test}, config())
    assert carved.rows["test"] == test
    assert len(carved.rows["validation"]) == 5
    dev = rows_of([dialogue(i) for i in range(70, 73)], "dev")
    assert chosen({"train": train, "test": test, "dev": dev}, config()).rows["validation"] == dev


def test_a_limit_draws_by_seed_and_keeps_the_order() -> None:
    rows = rows_of([dialogue(i) for i in range(40)])
    rest = {"test": rows_of([dialogue(i) for i in range(50, 60)]), "dev": rows_of([dialogue(i) for i in range(60, 63)])}
    asked = config(limit=10)
    found = chosen({"train": rows} | rest, replace(asked, evaluation=replace(asked.evaluation, prompts=4)))
    numbers = [int(row.id.split("_")[1]) for row in found.rows["train"]]
    assert len(numbers) == 10
    assert numbers == sorted(numbers) != list(range(10))
    assert found.outcomes["test"] == {"beyond evaluation.prompts": 6, "used for test": 4}


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["", dialogue(1), dialogue(2), dialogue(3), "short"], {"min_length": 10},
         r"leaves 0 rows for train \(1 no dialogue, 1 too short\); give more that differ, or loosen"),
        ([dialogue(i) for i in range(9)], {"max_length": 3}, r"leaves 0 rows for train \(9 too long\)"),
    ],
)  # fmt: skip
def test_too_few_rows_say_which_filter_took_what(texts: list[str], settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen({"train": rows_of(texts)}, config(**settings))


def test_a_batch_larger_than_the_training_rows_is_refused() -> None:
    asked = config()
    asked = replace(asked, rl=replace(asked.rl, batch_size=64, minibatch_size=16))
    with pytest.raises(InputError, match=r"rl\.batch_size = 64: exceeds the 14 rows left for training \(none was left"):
        chosen({"train": rows_of([dialogue(i) for i in range(20)])}, asked)


def test_a_source_without_training_rows_is_refused() -> None:
    source = {name: rows_of([dialogue(0)]) for name in ("test", "dev")}
    with pytest.raises(InputError, match=r"has no split named train; it has test, dev"):
        chosen(source, config())


# Near-same texts


def slow_groups(texts: list[str]) -> list[set[int]]:
    """The same groups by comparing all pairs."""
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
def test_near_groups_are_those_of_all_pairs(texts: list[str]) -> None:
    found = near_duplicate_groups(texts)
    expected = slow_groups(texts)
    for i in range(len(texts)):
        assert {j for j in range(len(texts)) if found[j] == found[i]} == expected[i]


def test_one_changed_word_is_near_and_another_dialogue_is_not() -> None:
    changed = dialogue(0).replace("soup0", "stew")
    a, b, c = near_duplicate_groups([dialogue(0), changed, dialogue(1)])
    assert a == b != c


# Prompts


def test_a_long_dialogue_is_cut_at_its_end_between_words_and_the_instruction_is_kept(bases: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(bases["t5"]))
    data = DataConfig(template="Sum up:\n{dialogue}\nSummary:", max_prompt_tokens=40)
    long = "#Person1#: You lost my parcel, you pig! " * 20
    rows = [Row(id="a", dialogue=long, summary="s"), Row(id="b", dialogue="Hello.", summary="s")]
    (cut, whole), lengths = with_prompts(rows, data, tokenizer)
    assert lengths[0] > 40 > lengths[1]
    assert token_lengths(tokenizer, [cut.prompt])[0] in range(30, 41)
    kept = cut.prompt.removeprefix("Sum up:\n").removesuffix("\nSummary:")
    assert long.startswith(kept)
    assert long[len(kept)] == " "
    assert cut.dialogue == long
    assert whole.prompt == "Sum up:\nHello.\nSummary:"


@pytest.mark.parametrize("limit", range(12, 30))
def test_a_cut_prompt_is_the_longest_that_fits_even_without_spaces(bases: dict[str, Path], limit: int) -> None:
    tokenizer = load_tokenizer(str(bases["t5"]))
    data = DataConfig(template="{dialogue}", max_prompt_tokens=limit)
    text = "\n" + "abcdefgh" * 30  # the one space stands where cutting would leave nothing
    (row,), _ = with_prompts([Row(id="a", dialogue=text, summary=None)], data, tokenizer)
    assert token_lengths(tokenizer, [row.prompt])[0] <= limit
    assert token_lengths(tokenizer, [text[: len(row.prompt) + 1]])[0] > limit


def test_a_template_longer_than_the_limit_is_refused(bases: dict[str, Path]) -> None:
    data = DataConfig(max_prompt_tokens=3)
    with pytest.raises(InputError, match=r"data\.max_prompt_tokens = 3: is less than the template itself takes"):
        with_prompts([Row(id="a", dialogue="Hi.", summary=None)], data, load_tokenizer(str(bases["t5"])))


def test_a_byte_order_mark_a_lone_surrogate_and_ids_that_look_like_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffkey,talk,gist\n007,1,2020-01-01\n7,true,x\n", encoding="utf-8")
    found = read_source(config(tmp_path / "a.csv", id_column="key").data)["file"]
    assert [(row.id, row.dialogue, row.summary) for row in found] == [("007", "1", "2020-01-01"), ("7", "true", "x")]
    (tmp_path / "a.JSONL").write_text('\ufeff{"talk": "a \\ud83d b", "gist": "c"}\n\n', encoding="utf-8")
    assert read_source(config(tmp_path / "a.JSONL").data)["file"][0].dialogue == "a ? b"


def test_a_folder_reads_every_file_or_says_which_fits_no_split(tmp_path: Path) -> None:
    place = tmp_path / "f[1]"  # no pattern
    place.mkdir()
    write(place / "train.csv", [{"talk": "None", "gist": "NA"}])
    write(place / "my-test-v2.jsonl", records(2))
    (place / "notes.txt").write_text("no data")
    found = read_source(config(place).data)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 1, "test": 2}
    assert found["train"][0].dialogue == "None"
    for name in ("latest.jsonl", "test.json"):
        write(place / name, records(1))
        with pytest.raises(InputError, match=rf"holds (my-test-v2.jsonl|{name}), which fits no one split; name each"):
            read_source(config(place).data)
        (place / name).unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no data file; give \.csv, \.json"):
        read_source(config(tmp_path / "empty").data)


def test_two_splits_for_one_purpose_are_both_counted() -> None:
    numbers = {"train": range(9), "dev": range(20, 22), "valid": range(40, 41), "test": range(30, 32)}
    source = {name: rows_of([dialogue(i) for i in those], name) for name, those in numbers.items()}
    assert len(chosen(source, config()).rows["validation"]) == 3


def test_lengths_may_be_counted_in_tokens() -> None:
    rows = rows_of([dialogue(i) for i in range(30)] + [dialogue(99) + " word" * 9])
    found = select({"train": rows}, config(max_length=25), lambda texts: [len(text.split()) for text in texts])
    assert found.outcomes["train"]["too long"] == 1


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


def test_a_short_text_is_near_to_itself_alone() -> None:
    a, b, c = near_duplicate_groups(["Hello there", "Hello, there!", "Good bye"])
    assert a == b != c
