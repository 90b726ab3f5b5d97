"""Which policy is kept, that a folder is never half written, and that one process at a time writes in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from detoxrl.config.edit import config_to_json
from detoxrl.config.recipes import recipe
from detoxrl.config.schema import RlConfig
from detoxrl.errors import InputError
from detoxrl.runtime import files as storage
from detoxrl.runtime import run_folder as tracking
from detoxrl.runtime.files import replace_folder
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training.best import BestCheckpoint, Validation


class FakePolicy:
    """Writes its name where a policy would write its weights."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text(self.name)


def begin(root: Path, overwrite: bool = False) -> RunFolder:
    with RunFolder(root).locked() as folder:
        folder.begin(recipe("quickstart"), {"machine": {}}, overwrite)
    return folder


def kept(tmp_path: Path, found: list[tuple[float, float]], margin: float = 0.01, error: float = 0.005) -> int:
    folder = RunFolder(tmp_path)
    best = BestCheckpoint(folder, RlConfig(quality_margin=margin))
    for step, (toxicity, quality) in enumerate(found):
        validation = Validation(
            step=step, toxicity=toxicity, toxicity_error=error, quality=quality, length=20, score=0.0, kl=0.0
        )
        best.offer(FakePolicy(str(step)), validation)  # type: ignore[arg-type]
    step = folder.read_json("checkpoint.json")["kept_step"]
    assert (tmp_path / "adapter" / "weights").read_text() == str(step)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return int(step)


@pytest.mark.parametrize(
    ("found", "step"),
    [
        ([(0.3, 0.9), (0.1, 0.9), (0.2, 0.9)], 1),  # the least toxic, not the last
        ([(0.3, 0.9), (0.1, 0.88), (0.2, 0.9)], 2),  # unless it lost facts
        ([(0.3, 0.9), (0.1, 0.8)], 0),  # nothing better: the start stays
        ([(0.3, 0.9), (0.1, 0.891), (0.103, 0.9)], 2),  # as good within the error: more facts win
        ([(0.3, 0.9), (0.103, 0.9), (0.1, 0.891)], 1),
        ([(0.3, 0.9), (0.103, 0.9), (0.09, 0.891)], 2),  # beyond the error: less toxic wins
    ],
)
def test_the_least_toxic_checkpoint_with_its_facts_kept_stays(
    tmp_path: Path, found: list[tuple[float, float]], step: int
) -> None:
    assert kept(tmp_path, found) == step


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
    with pytest.raises(InputError, match="exists already; add --resume"):
        begin(tmp_path / "run")
    (tmp_path / "run" / "old").touch()
    begin(tmp_path / "run", overwrite=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json", "run.json"}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday").touch()
    (tmp_path / "photos" / "config.json").write_text('{"model_type": "t5"}')
    for overwrite in (True, False):
        with pytest.raises(InputError, match=r"is no run folder.*nothing was deleted"):
            begin(tmp_path / "photos", overwrite)
    assert (tmp_path / "photos" / "holiday").exists()
    with pytest.raises(InputError, match="is a file; name a folder"):
        RunFolder.refuse_unfit(tmp_path / "photos" / "holiday", overwrite=True)
    with pytest.raises(InputError, match="cannot be made: File exists; name another folder"):
        begin(tmp_path / "photos" / "holiday")


def test_a_folder_opens_with_its_config_and_names_the_stage_that_is_missing(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    folder, read = RunFolder.open(tmp_path / "run")
    assert read == recipe("quickstart")
    with pytest.raises(InputError, match="has no adapter; run `detoxrl train"):
        folder.need("adapter", "train")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        RunFolder.open(tmp_path)


def test_an_edited_config_is_bad_input_named_by_its_field(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    folder.write("config.json", config_to_json(recipe("quickstart")).replace('"clip": 0.2', '"clip": "wide"'))
    with pytest.raises(InputError, match=r"rl\.clip = 'wide'"):
        RunFolder.open(tmp_path / "run")


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    begin(tmp_path)
    for name in ("adapter/.weights.new12", "checkpoints/train/.step-00000003.new12", ".adapter.old12"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "part").touch()
    (tmp_path / ".eval.json.new12").touch()
    (tmp_path / ".base.gone12").mkdir()
    (tmp_path / ".start.old12").mkdir()  # set aside for what did not come
    (tmp_path / ".start.old12/weights").touch()
    (tmp_path / "adapter/.mine").touch()
    with RunFolder(tmp_path).locked():
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".lock", "config.json", "run.json", "adapter/.mine", "start/weights"}


def test_a_run_killed_before_it_had_a_config_is_no_run_yet(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    (tmp_path / "run/.config.json.new12").touch()
    (tmp_path / "run/run.json").write_text("{}")
    begin(tmp_path / "run")
    assert (tmp_path / "run/config.json").exists()


def test_a_run_that_is_being_replaced_stays_the_old_one_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin(tmp_path / "run")
    folder.write_json("seconds.json", {"prepare": 1.0, "sft": 1.0})
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    gone: list[str] = []

    def die_third(path: Path) -> None:
        gone.append(path.name)
        if len(gone) == 3:
            raise KeyboardInterrupt
        storage.remove_path(path)

    monkeypatch.setattr(tracking, "remove", die_third)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "run", overwrite=True)
    # Nothing counts as done any more, and what is there is whole: the old run can make the rest anew.
    assert (tmp_path / "run/run.json").exists()
    assert gone[0] == "seconds.json"
    assert RunFolder.open(tmp_path / "run")[1] == recipe("quickstart")
    assert folder.finished() == {}


def test_a_link_to_another_disk_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (tmp_path / "large/train").mkdir(parents=True)
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "large")
    begin(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run/checkpoints").exists()
    assert (tmp_path / "large/train").exists()


def test_a_text_is_on_the_disk_before_its_name_is_and_the_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(storage, "sync", lambda path: synced.append(f"{path.name} {(tmp_path / 'text').exists()}"))
    storage.write_text(tmp_path / "text", "whole")
    assert synced == [f".text.new{os.getpid()} False", f"{tmp_path.name} True"]


def test_lines_are_read_up_to_the_first_torn_one(tmp_path: Path) -> None:
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


def test_a_stage_that_begins_again_undoes_those_after_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for stage in ("prepare", "sft", "train", "evaluate"):
        with folder.timed(stage):
            pass
    assert list(folder.finished()) == ["prepare", "sft", "train", "evaluate"]
    with pytest.raises(KeyboardInterrupt), folder.timed("train"):
        raise KeyboardInterrupt
    assert list(folder.finished()) == ["prepare", "sft"]
