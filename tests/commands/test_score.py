"""Texts are rated through the command line: what is printed, for people and for programs, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from detoxrl.evaluation import judges
from detoxrl.evaluation.judges import Judge, JudgeSource, profanity_judge
from detoxrl.evaluation.statistics import Floats
from detoxrl.rewards.classifier import load_classifier
from detoxrl.runtime import console
from small_runs import detoxrl

JUDGE = "alt-profanity-check"
RUDE = "You are an idiot."
CIVIL = "Thank you very much."


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def rated(texts: Sequence[str]) -> Floats:
    judge = profanity_judge()
    assert judge is not None
    return judge(texts)


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """Return the objects that `score --jsonl` prints."""
    assert detoxrl(["score", "--jsonl", *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]


def table_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Return the lines that `score` prints; each fits 80 columns."""
    assert detoxrl(["score", *words]) == 0
    shown = capsys.readouterr().out.split("\n")
    assert max(map(len, shown)) <= 80
    return shown


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def judge_by(rate: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `rate` take the place of every judge."""
    monkeypatch.setattr(judges, "load_judge", lambda source: rate)


# Without torch


def test_the_judge_of_words_imports_neither_torch_nor_transformers_nor_peft(tmp_path: Path) -> None:
    Path("mine.csv").write_text(f"text\n{RUDE}\n{CIVIL}\n")
    code = (
        "import sys\n"
        "from detoxrl import cli\n"
        "cli.main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    for words in (["--file", "mine.csv"], ["--jsonl", RUDE, CIVIL]):
        words += ["--judge", JUDGE]
        run = subprocess.run([sys.executable, "-c", code, "score", *words], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert "You are an i****." in run.stdout
        assert "\x1b" not in run.stdout
        assert run.stderr == ""


def test_a_closed_pipe_is_no_error() -> None:
    Path("many.txt").write_text(f"{RUDE}\n" * 600)
    words = [sys.executable, "-m", "detoxrl", "score", "--file", "many.txt", "--jsonl"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Error" not in process.stderr.read()
        assert process.wait() == 1


# For people


def test_the_table_has_a_row_per_text_and_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table_of(capsys, RUDE, CIVIL)
    rude, civil = rated([RUDE, CIVIL])
    assert shown[0].split() == ["#", "text", JUDGE]
    assert shown[2].rstrip() == f"1   You are an i****.      {rude:.3f} ██████████████"
    assert shown[3].rstrip() == f"2   Thank you very much.   {civil:.3f}"
    assert shown[4] == "toxic words are masked; --show shows them"
    assert shown[5] == f"{JUDGE}: 2 texts, mean {(rude + civil) / 2:.3f}, 1 toxic (0.5 or above)"
    assert shown[6:] == [""]


def test_one_text_has_no_summary_and_show_masks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table_of(capsys, RUDE, "--show")
    assert "1   You are an idiot." in shown[2]
    assert shown[3:] == [""]


def test_of_many_texts_the_most_toxic_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_by(lambda texts: np.array([int(text) / 1000 if text.isdigit() else 0.0 for text in texts]), monkeypatch)
    shown = table_of(capsys, *map(str, range(40)))
    assert [line.split()[0] for line in shown[2:42]] == [str(number) for number in range(1, 41)]

    Path("many.txt").write_text("".join(f"{number}\n" for number in range(601)))
    assert detoxrl(["score", "--file", "many.txt", "--show"]) == 0
    captured = capsys.readouterr()
    shown = captured.out.split("\n")
    assert [line.split()[:2] for line in shown[2:22]] == [[str(n + 1), f"{n}"] for n in range(600, 580, -1)]
    assert shown[22] == "the 20 most toxic of 601 texts; --jsonl prints all"
    assert shown[23] == f"{JUDGE}: 601 texts, mean 0.300, 101 toxic (0.5 or above)"
    assert "score: 100 % (601 of 601)" in captured.err


def test_hostile_texts_neither_control_the_terminal_nor_are_read_as_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    escape = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eback"
    shown = table_of(capsys, escape, "[bold]a[/bold] :smile: [/x]", "two\nlines\rand\u2028more", "שלום 😀", " \t", "")
    assert r"\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eback" in shown[2]
    assert "[bold]a[/bold] :smile: [/x]" in shown[3]
    assert "two lines and more" in shown[4]
    assert "שלום 😀" in shown[5]
    assert "(empty)" in shown[6]
    assert "(empty)" in shown[7]
    assert all(character.isprintable() for line in shown for character in line)


def test_a_long_text_is_cut_to_one_line_after_it_was_masked(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table_of(capsys, "an idiot " * 100_000, "你好" * 100)
    assert "an i**** an i****" in shown[2]
    assert "idio" not in "".join(shown)
    assert "…" in shown[2]
    assert shown[3].startswith("2   你好你好")
    assert "…" in shown[3]
    assert f"{JUDGE}: 2 texts" in shown[5]


def test_colours_follow_the_value_in_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"a": 0.1, "b": 0.3, "c": 0.9}
    judge_by(lambda texts: np.array([values.get(text, 0.0) for text in texts]), monkeypatch)
    assert "\x1b" not in "".join(table_of(capsys, "a", "b", "c"))

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert detoxrl(["score", "a", "b", "c"]) == 0
    shown = capsys.readouterr().out
    for colour, value in ((32, "0.100 █▍"), (33, "0.300 ████▎"), (31, "0.900 ████████████▋")):
        assert f"\x1b[{colour}m{value}" in shown


def test_an_encoding_without_blocks_shows_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert detoxrl(["score", "idiot é"]) == 0
    sys.stdout.flush()
    assert b"i**** ? | 1.000 ##############" in written.getvalue()


# For programs


def test_json_lines_hold_every_text_in_order_and_a_key_per_judge(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [RUDE, CIVIL, "", "é😀\x1b\u2028\x9b", RUDE]
    Path("a.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert detoxrl(["score", "--file", "a.json", "--jsonl"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.isascii()
    assert "\x1b" not in captured.out

    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [list(line) for line in lines] == [["index", "text", JUDGE]] * 5
    assert [line["index"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["text"] for line in lines] == ["You are an i****.", *texts[1:4], "You are an i****."]
    assert [line[JUDGE] for line in lines] == pytest.approx(rated(texts), abs=1e-6)

    shown = lines_of(capsys, "--file", "a.json", "--show")
    assert [line["text"] for line in shown] == texts


def test_words_that_the_judge_calls_toxic_are_masked_where_no_word_judge_is_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "A Parcel, two PARCELS, a stupidity, an Idiot!"
    judge_by(lambda texts: np.array([0.5 * ("parcel" in text.lower()) for text in texts]), monkeypatch)
    assert lines_of(capsys, text)[0]["text"] == "A Parcel, two PARCELS, a s********, an I****!"

    monkeypatch.setattr("detoxrl.commands.score.profanity_judge", lambda: None)
    judge_by(lambda texts: np.array([0.5 * ("Parcel".lower() in text.lower()) for text in texts]), monkeypatch)
    masked = "A P*****, two P******, a stupidity, an I****!"
    assert lines_of(capsys, "A Parcel, two PARCELS, a stupidity, an Idiot!")[0]["text"] == masked
    assert masked in table_of(capsys, "A Parcel, two PARCELS, a stupidity, an Idiot!")[2]


def test_a_progress_bar_in_the_terminal_leaves_stdout_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(console, "log", Console(file=terminal, force_terminal=True, width=80))
    Path("many.txt").write_text("".join(f"{number}\n" for number in range(600)))
    lines = lines_of(capsys, "--file", "many.txt")
    assert [(line["index"], line["text"]) for line in lines] == [(n + 1, str(n)) for n in range(600)]
    assert "600/600" in terminal.getvalue()
    assert "index" not in terminal.getvalue()


def test_judges_of_one_name_are_told_apart_or_refused(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    for folder in ("a/m", "b/m", "text"):
        copytree("classifier", folder)
    (line,) = lines_of(capsys, "Thank you.", "--judge", str(place / "a/m=hate"), str(place / "b/m=hate"))
    assert line.keys() == {"index", "text", "m", "m (hate)"}

    words = ["score", "Thank you.", "--judge", *(str(place / f"{name}/m=hate") for name in ("a", "b", "a/../a"))]
    assert detoxrl(words) == 2
    assert "is called m (hate) in results, as another judge is" in capsys.readouterr().err
    assert detoxrl(["score", "Thank you.", "--jsonl", "--judge", str(place / "text=hate")]) == 2
    assert "--judge = 'text': is the name of another key" in capsys.readouterr().err


def test_the_embedded_judge_is_the_reward_model_that_comes_with_the_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    insult, thanks = lines_of(capsys, "You are a stupid idiot!", "Thank you.", "--judge", "embedded")
    assert insult["embedded"] > 0.9
    assert thanks["embedded"] < 0.1


# Files and pipes


def test_line_n_of_a_text_file_is_text_n(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["one", "", "a\u2028b\x85c\x0cd\re", " spaced ", ""]
    Path("a.txt").write_bytes("\ufeffone\r\n\na\u2028b\x85c\x0cd\re\n spaced \r\n\n".encode())
    Path("without end").write_bytes("\n".join(texts[:4]).encode())
    assert [line["text"] for line in lines_of(capsys, "--file", "a.txt")] == texts
    assert [line["text"] for line in lines_of(capsys, "--file", "without end")] == texts[:4]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_a_column_of_a_file_is_read(capsys: pytest.CaptureFixture[str], name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "first\nline", "body": "é"}, {"text": CIVIL, "body": ""}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    contents = {
        "a.jsonl": text.encode(),
        "a.jsonl.gz": gzip.compress(text.encode()),
        "a.json": json.dumps(rows).encode(),
        "a.csv": f'text,body\n"first\nline",é\n{CIVIL},\n'.encode(),
    }
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), name)
    else:
        Path(name).write_bytes(contents[name])

    assert [line["text"] for line in lines_of(capsys, "--file", name)] == ["first\nline", CIVIL]
    assert [line["text"] for line in lines_of(capsys, "--column", "body", "--file", name)] == ["é", ""]


def test_a_row_without_a_text_is_an_empty_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"other": 1}\n')
    assert [line["text"] for line in lines_of(capsys, "--file", "a.jsonl")] == ["a", "", ""]


def test_stdin_is_read_when_nothing_else_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in ([], ["--file", "-"], ["--file=-"]):
        pipe(monkeypatch, b"one\n\ntwo")
        assert [line["text"] for line in lines_of(capsys, *words)] == ["one", "", "two"]
    pipe(monkeypatch, b"not read")
    assert [line["text"] for line in lines_of(capsys, "given")] == ["given"]


def test_without_a_text_in_a_terminal_one_line_says_what_to_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdin in (Terminal(), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert detoxrl(["score"]) == 2
        message = 'TEXT = \'\': is missing; type detoxrl score "You are an idiot" "Thank you", or --file FILE'
        assert capsys.readouterr() == ("", f"detoxrl: {message}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--file", "none.txt"], "'none.txt': is not a file; . contains a.csv, a.txt, bad.csv, bad.jsonl, bad.txt"),
        (["--file", "none.csv"], "--file = 'none.csv': is not a file; . contains a.csv, bad.csv, bad.jsonl, deep.json"),
        (["--file", "folder"], "--file = 'folder': is not a file; folder contains no data file"),
        (["--file", "empty.txt"], "--file = 'empty.txt': is empty; give one text per line"),
        (["--file", "empty.jsonl"], "--file = 'empty.jsonl': contains no rows"),
        (["--file", "a.txt/b"], "--file = 'a.txt/b': is not a file; there is no folder a.txt"),
        (["--file", "x" * 5000], "': cannot be read: File name too long; give a file that can be read"),
        (["--file", "bad.txt"], "--file = 'bad.txt': cannot be read: line 2 is not UTF-8 (byte 0xe9); save it as"),
        (["--file", "bad.jsonl"], "--file = 'bad.jsonl': cannot be read: line 3 is not UTF-8 (byte 0xff); give UTF-8"),
        (["--file", "bad.csv"], "--file = 'bad.csv': cannot be read: line 2 is not UTF-8 (byte 0xc3)"),
        (["--file", "deep.json"], "--file = 'deep.json': cannot be read: "),
        (["--file", "a.csv"], "--column = 'text': is not a column of a.csv; choose from body, number"),
        (["--file", "a.csv", "--column", "b"], "--column = 'b': is not a column of a.csv; choose from body, number"),
        (["--file", "esc.csv"], r"is not a column of esc.csv; choose from \x1b[31m\u202ex"),
        (["--file", "n.jsonl"], "--column = 'text': contains int, not text, in row 2 of n.jsonl; name a column of te"),
        (["--file", "a.txt", "--column", "b"], "--column = 'b': requires a file with columns; give a --file that ends"),
        (["--column", "b", "text"], "--column = 'b': requires a file with columns"),
        (["--file", "a.txt", "text"], "--file = 'a.txt': cannot be combined with texts on the command line; leave"),
        (["--file", "-"], "--file = '-': is empty; give one text per line"),
        ([], "--file = '-': is empty; give one text per line"),
        (["caf\udce9"], r"TEXT = 'caf\udce9': is not UTF-8; encode it as UTF-8"),
        (["-x"], "flag = '-x': is not known to `detoxrl score`; put -- before a TEXT that begins with a dash"),
        (["text", "--judge", "alt-profanity-chek"], "nor SOURCE=LABEL; did you mean alt-profanity-check?"),
        (["--judge", JUDGE, "text"], "--judge = 'text': is neither perspective-minilm nor"),
        (["text", "--judge", "embeded"], "did you mean embedded?"),
        (["text", "--judge", "=toxic"], "--judge = '=toxic': is neither"),
        (["text", "--judge", "folder="], "--judge = 'folder=': is neither"),
        (["text", "--judge", JUDGE, "no/such/folder=x"], "--judge = 'no/such/folder': is neither an existing path nor"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_a_judge_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    def fail(source: JudgeSource) -> Judge:
        raise AssertionError(f"{source} was loaded")

    monkeypatch.setattr(judges, "load_judge", fail)
    pipe(monkeypatch, b"")
    Path("folder").mkdir()
    files = {
        "a.txt": b"text\n", "empty.txt": b"", "empty.jsonl": b"", "bad.txt": b"ok\ncaf\xe9\n",
        "bad.jsonl": b'{"text": "a"}\n\n{"text": "\xff"}\n', "bad.csv": b"text\n\xc3", "deep.json": b"[" * 100_000,
        "a.csv": b"body,number\na,1\n", "esc.csv": "\x1b[31m\u202ex\na\n".encode(),
        "n.jsonl": b'{"text": "a"}\n{"text": 1}\n',
    }  # fmt: skip
    for name, content in files.items():
        Path(name).write_bytes(content)

    assert detoxrl(["score", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.removesuffix("\n").isprintable()


def test_a_judge_whose_package_is_missing_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    assert detoxrl(["score", "text"]) == 2
    message = "--judge = 'alt-profanity-check': is not installed; pip install 'detoxrl[offline]'"
    assert capsys.readouterr() == ("", f"detoxrl: {message}\n")


# Classifiers


def test_classifiers_judge_beside_the_default_judge(capsys: pytest.CaptureFixture[str], reward_folder: Path) -> None:
    Path("classifier").symlink_to(reward_folder)
    texts = [RUDE, CIVIL]
    words = [*texts, "--judge", "classifier=hate", JUDGE, "--judge", "./classifier=hate", "classifier=hate", JUDGE]
    lines = lines_of(capsys, *words)
    assert [list(line) for line in lines] == [["index", "text", "classifier", JUDGE, "classifier (hate)"]] * 2

    device = torch.device("cpu")
    classifier = load_classifier(str(reward_folder), "--judge", {"--judge": "hate"}, device)
    hate = classifier.toxicity(texts).double().numpy()
    assert [line["classifier"] for line in lines] == pytest.approx(hate, abs=1e-6)
    assert [line[JUDGE] for line in lines] == pytest.approx(rated(texts), abs=1e-6)


def test_three_judges_leave_the_text_its_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first/classifier", "[bold]b"):
        Path(name).mkdir(parents=True)
    judge_by(lambda texts: np.array([0.5 * (len(text) > 20) for text in texts]), monkeypatch)
    words = ["Words " * 20, "--judge", "first/classifier=toxic", "[bold]b=toxic", JUDGE]
    shown = table_of(capsys, *words)
    assert "[bold]b" in "\n".join(shown)
    row = next(line for line in shown if line.startswith("1 "))
    assert "Words Words Words Words Words …" in row
    assert row.count("0.500 ██") == 3


def test_a_label_that_the_classifier_lacks_is_one_line(capsys: pytest.CaptureFixture[str], reward_folder: Path) -> None:
    assert detoxrl(["score", "text", "--judge", f"{reward_folder}=bad"]) == 2
    message = "detoxrl: --judge = 'bad': is not a label of the classifier; use one of nothate, hate\n"
    assert capsys.readouterr() == ("", message)
