"""Which policy is kept, that a folder is never half written, and that one process at a time writes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from detoxrl.best import BestCheckpoint, Validation
from detoxrl.errors import InputError
from detoxrl.recipes import recipe
from detoxrl.settings import config_to_json
from detoxrl.storage import filling
from detoxrl.tracking import RunFolder


class FakePolicy:
    """Writes its name where a policy would write its weights."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text(self.name)


def begin(root: Path, overwrite: bool = False) -> RunFolder:
    with RunFolder(root).held() as folder:
        folder.begin(recipe("quickstart"), {"threads": 2}, overwrite)
    return folder


def kept(tmp_path: Path, found: list[tuple[float, float]], margin: float = 0.01, error: float = 0.005) -> int:
    folder = RunFolder(tmp_path)
    best = BestCheckpoint(folder, margin)
    for step, (toxicity, quality) in enumerate(found):
        validation = Validation(step=step, toxicity=toxicity, toxicity_error=error, quality=quality, length=20)
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
    with filling(folder / "adapter") as temporary:
        (temporary / "weights").write_text("old")

    def fail() -> None:
        with filling(folder / "adapter") as temporary:
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
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.json", "machine.json"}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday").touch()
    (tmp_path / "photos" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InputError, match=r"is no run folder.*nothing was deleted"):
        begin(tmp_path / "photos", overwrite=True)
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
