"""The best checkpoint stays, files and folders are never half written, and only one process writes at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from detoxrl.config.edit import config_to_json
from detoxrl.config.recipes import recipe
from detoxrl.config.schema import RlConfig
from detoxrl.errors import InputError
from detoxrl.runtime import files, run_folder
from detoxrl.runtime.files import replace_folder
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.runtime.signals import Terminated
from detoxrl.training.best import BestCheckpoint
from detoxrl.training.validation import Validation


class FakePolicy:
    """A policy whose weights are a file with its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text(self.name)


def begin(root: Path, overwrite: bool = False) -> RunFolder:
    with RunFolder(root).locked() as folder:
        folder.begin(recipe("quickstart"), {"machine": {}}, overwrite)
    return folder


def kept_step(tmp_path: Path, validations: list[tuple[float, float]]) -> int:
    """Offer checkpoints with these (toxicity, quality), and return the step whose weights the folder has then."""
    folder = RunFolder(tmp_path)
    best = BestCheckpoint(folder, RlConfig(quality_margin=0.01), "facts")
    for step, (toxicity, quality) in enumerate(validations):
        validation = Validation(
            step=step, toxicity=toxicity, toxicity_error=0.005, quality=quality, length=20, score=0.0, kl=0.0
        )
        best.offer(FakePolicy(str(step)), validation)  # type: ignore[arg-type]

    step = folder.read_json("checkpoint.json")["kept_step"]
    assert (tmp_path / "adapter" / "weights").read_text() == str(step)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return int(step)


@pytest.mark.parametrize(
    ("validations", "step"),
    [
        ([(0.3, 0.9), (0.1, 0.9), (0.2, 0.9)], 1),  # the least toxic, not the last
        ([(0.3, 0.9), (0.1, 0.88), (0.2, 0.9)], 2),  # the least toxic lost facts
        ([(0.3, 0.9), (0.1, 0.8)], 0),  # nothing is better than the initial policy
        ([(0.3, 0.9), (0.1, 0.891), (0.103, 0.9)], 2),  # toxicity is equal within the error: more facts win
        ([(0.3, 0.9), (0.103, 0.9), (0.1, 0.891)], 1),
        ([(0.3, 0.9), (0.103, 0.9), (0.09, 0.891)], 2),  # toxicity differs by more than the error
    ],
)
def test_the_least_toxic_checkpoint_with_its_facts_kept_stays(
    tmp_path: Path, validations: list[tuple[float, float]], step: int
) -> None:
    assert kept_step(tmp_path, validations) == step


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with replace_folder(folder / "adapter") as temporary:
        (temporary / "weights").write_text("old")

    def fail() -> None:
        with replace_folder(folder / "adapter") as temporary:
            (temporary / "weights").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (tmp_path / "adapter" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_run_folder_is_replaced_only_on_request_and_only_if_it_is_one(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(InputError, match="already exists; add --resume"):
        begin(tmp_path / "run")
    (tmp_path / "run" / "old").touch()
    begin(tmp_path / "run", overwrite=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json", "run.json"}

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday").touch()
    (tmp_path / "photos" / "config.json").write_text('{"model_type": "t5"}')
    for overwrite in (True, False):
        with pytest.raises(InputError, match=r"is not a run folder.*nothing was deleted"):
            begin(tmp_path / "photos", overwrite)
    assert (tmp_path / "photos" / "holiday").exists()
    with pytest.raises(InputError, match="is a file; name a folder"):
        RunFolder.require_usable(tmp_path / "photos" / "holiday", overwrite=True)
    with pytest.raises(InputError, match="cannot be created: File exists; name another folder"):
        begin(tmp_path / "photos" / "holiday")


def test_a_folder_opens_with_its_config_and_names_the_stage_that_is_missing(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    folder, config = RunFolder.open(tmp_path / "run")
    assert config == recipe("quickstart")
    with pytest.raises(InputError, match="has no adapter; run `detoxrl train"):
        folder.require_product("adapter", "train")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        RunFolder.open(tmp_path)


def test_a_run_that_does_not_exist_is_answered_with_the_one_that_is_meant_or_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = "does not exist; run `detoxrl prepare RECIPE` first"
    with pytest.raises(InputError, match=f"run folder = 'runs/mine': {first}"):
        RunFolder.open(Path("runs/mine"))
    (tmp_path / "runs/model").mkdir(parents=True)
    (tmp_path / "runs/model/config.json").write_text("{}")  # No run.
    begin(tmp_path / "runs/mine")
    begin(tmp_path / "runs/other")
    for name, remedy in (
        ("mine", r"did you mean runs/mine\?"),
        ("runs/mien", r"did you mean runs/mine\?"),
        ("runs/modle", "runs contains mine, other"),
        ("elsewhere/mine", "run `detoxrl prepare RECIPE` first"),
    ):
        with pytest.raises(InputError, match=f"run folder = '{name}': does not exist; {remedy}"):
            RunFolder.open(Path(name))


def test_an_edited_config_is_bad_input_named_by_its_field(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    folder.write("config.json", config_to_json(recipe("quickstart")).replace('"clip": 0.2', '"clip": "wide"'))
    with pytest.raises(InputError, match=r"rl\.clip = 'wide'"):
        RunFolder.open(tmp_path / "run")


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path: Path) -> None:
    begin(tmp_path)
    for name in ("adapter/.weights.new12", "checkpoints/train/.step-00000003.new12", ".adapter.old12"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "part").touch()
    (tmp_path / ".eval.json.new12").touch()
    (tmp_path / ".base.gone12").mkdir()
    (tmp_path / ".start.old12").mkdir()  # moved aside for a replacement that never came
    (tmp_path / ".start.old12/weights").touch()
    (tmp_path / "adapter/.mine").touch()
    with RunFolder(tmp_path).locked():
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".lock", "config.json", "run.json", "adapter/.mine", "start/weights"}


def test_a_run_killed_before_it_had_a_config_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    (tmp_path / "run/.config.json.new12").touch()
    (tmp_path / "run/run.json").write_text("{}")
    begin(tmp_path / "run")
    assert (tmp_path / "run/config.json").exists()


def test_a_run_killed_while_it_is_being_replaced_is_still_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin(tmp_path / "run")
    folder.write_json("seconds.json", {"prepare": 1.0, "sft": 1.0})
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    removed: list[str] = []

    def die_at_the_third(path: Path) -> None:
        removed.append(path.name)
        if len(removed) == 3:
            raise KeyboardInterrupt
        files.remove_path(path)

    monkeypatch.setattr(run_folder, "remove_path", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "run", overwrite=True)
    # No stage counts as finished, and what is left is intact, so the old run can rebuild the rest.
    assert (tmp_path / "run/run.json").exists()
    assert removed[0] == "seconds.json"
    assert RunFolder.open(tmp_path / "run")[1] == recipe("quickstart")
    assert folder.finished() == {}


def test_a_link_to_another_disk_is_removed_but_not_its_target(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (tmp_path / "large/train").mkdir(parents=True)
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "large")
    begin(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run/checkpoints").exists()
    assert (tmp_path / "large/train").exists()


def test_a_text_is_flushed_before_it_is_renamed_and_its_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []  # name, and whether the text has its final name by then
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path.name, (tmp_path / "text").exists())))
    files.write_text(tmp_path / "text", "whole")
    assert synced == [(f".text.new{os.getpid()}", False), (tmp_path.name, True)]


def test_lines_are_read_up_to_the_first_corrupted_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_lines("responses.jsonl") == []
    for number in range(3):
        folder.append("responses.jsonl", {"n": number})
    whole = (tmp_path / "responses.jsonl").read_bytes()
    (tmp_path / "responses.jsonl").write_bytes(whole[:-3] + b"\x00\n" + whole)
    assert folder.read_lines("responses.jsonl") == [{"n": 0}, {"n": 1}]
    assert (tmp_path / "responses.jsonl").read_bytes() == whole[: len(whole) * 2 // 3]


def test_metrics_refuse_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RunFolder(tmp_path).append("metrics.jsonl", {"step": 0, "kl": float("nan")})


def test_a_stage_that_starts_again_marks_the_later_ones_as_not_finished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for stage in ("prepare", "sft", "train", "evaluate"):
        with folder.timed(stage):
            pass
    assert list(folder.finished()) == ["prepare", "sft", "train", "evaluate"]
    with pytest.raises(KeyboardInterrupt), folder.timed("train"):
        raise KeyboardInterrupt
    assert list(folder.finished()) == ["prepare", "sft"]


def test_seconds_of_a_stage_count_all_parts_that_a_signal_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(run_folder.time, "perf_counter", lambda: clock[0])
    folder = RunFolder(tmp_path)

    def train(seconds: float, stop: type[KeyboardInterrupt] | None = None) -> dict[str, float]:
        with folder.timed("train") as taken:
            clock[0] += seconds
            if stop:
                raise stop
            return taken()

    for stop in (KeyboardInterrupt, Terminated):
        with pytest.raises(stop):
            train(10, stop)
        assert folder.finished() == {}
    assert train(5) == folder.finished() == {"train": 25}
    assert {path.name for path in tmp_path.iterdir()} == {"seconds.json"}

    with pytest.raises(KeyboardInterrupt):
        train(10, KeyboardInterrupt)
    folder.forget_parts()  # The stage is made again from its beginning.
    assert train(3) == folder.finished() == {"train": 3}


def test_what_an_earlier_run_left_is_named_and_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path)
    folder.discard(["adapter", "eval.json"])
    assert capsys.readouterr().err == ""

    for names, message in (
        (["eval.json"], "removing eval.json: it is left over from an earlier run"),
        (["eval.json", "adapter"], "removing eval.json, adapter: they are left over from an earlier run"),
    ):
        for name in names:
            folder.write(name, "old")
        folder.discard([*names, "missing"])
        assert message in " ".join(capsys.readouterr().err.split())
        assert list(tmp_path.iterdir()) == []
