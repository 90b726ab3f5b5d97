"""Files of a run that are torn, empty or of another kind are told in one line, whatever command reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detoxrl.runtime.run_files import require_contents
from small_runs import as_it_was, contents, detoxrl, kept_run, own

FILES = (
    "run.json", "seconds.json", "rows.json", "checkpoint.json", "memory.json", "normaliser.json", "eval.json",
    "masked_words.json", "config.json", "metrics.jsonl", "validation.jsonl", "samples.jsonl", "rollouts.jsonl",
)  # fmt: skip
ODD = {
    "empty": "", "an empty object": "{}", "an empty list": "[]", "null": "null", "a number": "7", "torn": '{"task": "',
    "deep": "[" * 100_000, "a list of nothing": "[null]", "another object": '{"a": {"b": [1]}}', "no UTF-8": "\udcff",
    "NaN": '{"train": NaN}',
}  # fmt: skip
COMMANDS = {
    "report": ["report", "run"],
    "resume": ["run", "--resume", "--run-dir", "run"],
    "longer": ["run", "--resume", "--accept-changes", "--run-dir", "run", "--rl.steps", "2"],
    "export": ["export", "run", "--to", "exported"],
}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], reward_folder: Path) -> Path:
    """A place with a run of one step, in which nothing changes."""
    words = own("--run-dir", "run", "--rl.steps", "1", "--evaluation.best-of", "none")
    return kept_run(tmp_path_factory.mktemp("once"), bases, reward_folder, words)


@pytest.fixture
def finished(once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of one step, as it was then."""
    place = as_it_was(once)
    monkeypatch.chdir(place)
    return place / "run"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_odd_file_of_a_run_is_one_line_or_is_not_read(
    command: str, name: str, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    intact = (finished / name).read_bytes()
    for what, text in ODD.items():
        (finished / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        before = contents(finished)
        capfd.readouterr()
        code = detoxrl(COMMANDS[command])
        error = capfd.readouterr().err
        assert code in (0, 1, 2), what
        assert "Traceback" not in error
        if code > 0:
            last = error.strip().splitlines()[-1]
            assert last.startswith("detoxrl: "), what
            assert "; " in last  # The remedy.
            assert len(last) < 1000
            after = contents(finished)
            assert before.pop(Path("seconds.json")) or name == "seconds.json"  # A stage that is made again has begun.
            after.pop(Path("seconds.json"))
            assert after == before, what
        else:
            break  # This command does not read the file.
        (finished / name).write_bytes(intact)


def test_what_a_run_writes_is_what_its_files_have_to_hold(finished: Path) -> None:
    for path in finished.glob("*.json"):
        require_contents(path.name, json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seconds.json", {"train": "long"}, "train: input should be a valid number"),
        (
            "memory.json",
            {"microbatch_size": 0, "keep_cross": True},
            "microbatch_size: input should be greater than or equal to 1",
        ),
        ("normaliser.json", {"classifier": {"mean": 0.0, "std": 0.0}}, "classifier"),
        (
            "run.json",
            {"settings": {}, "machine": {}, "changes": [], "measures": {"policies": {}, "texts": {}}},
            "measures.names: field required",
        ),
        ("masked_words.json", [1], "0: input should be a valid string"),
        ("eval.json", [], "the whole file: input should be a valid dictionary or instance of _evaluation"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_contents(name, value)


def test_other_files_may_hold_anything() -> None:
    require_contents("state.json", [1, {"a": None}])
