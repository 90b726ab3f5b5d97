"""A training loop that was stopped resumes from its newest intact checkpoint and ends bit-identical."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import KINDS, Make, prompted_rows
from detoxrl.config.schema import Config
from detoxrl.errors import StorageError
from detoxrl.models.loading import load_base
from detoxrl.runtime import checkpoint, files
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.files import replace_folder, write_text
from detoxrl.runtime.signals import Terminated
from detoxrl.training.finetune import Tuned, fine_tune
from small_runs import contents
from test_invariants import learn, loop_config, share_of_e

ROWS = prompted_rows({"train": 24})


class Killed(BaseException):
    """Nothing in detoxrl catches this, as nothing catches a kill."""


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a checkpoint at every step, whatever it costs."""
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)


class Loop:
    """A loop that trains one weight and writes a file, a folder and a log at each step."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.product = root / "product"
        self.folder = root / "folder"
        self.log = root / "log.jsonl"
        products = [self.product, self.folder, self.log]
        self.checkpoints = Checkpoints(root / "checkpoints", {"w": self.weight}, self.optimizer, products)

    def run(self, steps: int, die_at: int | None = None) -> int:
        """Do the remaining steps and return their number; die in the middle of step `die_at`."""
        state = self.checkpoints.restore() or {"step": 0, "seen": []}
        first = state["step"]
        seen = state["seen"]

        for step in range(first, steps + 1):
            self.checkpoints.point(step, {"seen": seen}, now=step == steps)
            if step == steps:
                break

            (self.weight * (step + 1)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

            seen = [*seen, step]
            write_text(self.product, str(self.weight.tolist()))
            with replace_folder(self.folder) as folder:
                (folder / "part").write_text(str(step))
            with self.log.open("a") as lines:
                lines.write(json.dumps({"step": step, "seen": seen}) + "\n")

            if step == die_at:
                raise Killed
        return steps - first


def uninterrupted(root: Path, steps: int = 6) -> dict[Path, bytes]:
    Loop(root).run(steps)
    return contents(root)


@pytest.mark.parametrize("die_at", range(6))
def test_a_loop_that_died_ends_equal(tmp_path: Path, each_step: None, die_at: int) -> None:
    with pytest.raises(Killed):
        Loop(tmp_path / "broken").run(6, die_at)
    assert Loop(tmp_path / "broken").run(6) == 6 - die_at
    assert contents(tmp_path / "broken") == uninterrupted(tmp_path / "whole")


# Corrupted checkpoints


def newest(root: Path) -> Path:
    return max(path for path in (root / "checkpoints").iterdir() if path.suffix == "")


def cut(path: Path) -> None:
    """Remove the last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Flip one bit of the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn weights": (lambda step: cut(step / "weights.safetensors"), "weights.safetensors does not match"),
    "edited weights": (lambda step: flip(step / "weights.safetensors"), "weights.safetensors does not match"),
    "edited moments": (lambda step: flip(step / "moments.safetensors"), "moments.safetensors does not match"),
    "edited state": (lambda step: (step / "state.json").write_text("{}"), "state.json does not match"),
    "edited product": (lambda step: flip(step / "products/folder/part"), "products/folder/part does not match"),
    "an extra file": (lambda step: (step / "more").touch(), "more does not match manifest.json"),
    "a missing file": (lambda step: (step / "products/product").unlink(), "products/product does not match"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "manifest.json: "),
    "torn manifest": (lambda step: cut(step / "manifest.json"), "manifest.json: "),
    "odd manifest": (lambda step: (step / "manifest.json").write_text("7"), "manifest.json: "),
    "shorter log": (lambda step: os.truncate(step / "products/log.jsonl", 60), "log.jsonl does not match"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_corrupted_checkpoint_is_named_and_the_one_before_is_restored(
    tmp_path: Path, each_step: None, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    with pytest.raises(Killed):
        Loop(tmp_path / "broken").run(6, die_at=3)
    names = sorted(path.name for path in (tmp_path / "broken/checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"]
    (tmp_path / "broken/checkpoints/step-00000003.bak").mkdir()  # a copy that the user made
    apply, message = DAMAGE[damage]
    apply(newest(tmp_path / "broken"))

    assert Loop(tmp_path / "broken").run(6) == 4

    printed = " ".join(capsys.readouterr().err.split())
    assert "step-00000003 is corrupted: " in printed
    assert message in printed
    (tmp_path / "broken/checkpoints/step-00000003.bak").rmdir()
    assert contents(tmp_path / "broken") == uninterrupted(tmp_path / "whole")


def test_nothing_is_deleted_when_all_checkpoints_are_corrupted(tmp_path: Path, each_step: None) -> None:
    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        Loop(broken).run(6, die_at=3)
    intact = contents(broken)
    for step in (broken / "checkpoints").iterdir():
        cut(step / "weights.safetensors")
    corrupted = contents(broken)
    message = r"3 is corrupted \(weights.safetensors does not match manifest.json\); restore that file, or"
    with pytest.raises(StorageError, match=message):
        Loop(broken).run(6)
    assert contents(broken) == corrupted

    # Both remedies that the message names.
    for path, content in intact.items():
        (broken / path).write_bytes(content)
    (broken / "log.jsonl").unlink()  # the checkpoint has a copy
    assert Loop(broken).run(6) == 3
    assert contents(broken) == uninterrupted(tmp_path / "whole")
    shutil.rmtree(broken / "checkpoints")
    assert Loop(broken).run(6) == 6
    assert contents(broken) == contents(tmp_path / "whole")


# When checkpoints are written and deleted


def test_two_checkpoints_are_kept_until_forget_says_how_many(tmp_path: Path, each_step: None) -> None:
    loop = Loop(tmp_path)
    loop.run(6)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    loop.checkpoints.forget(keep=1)
    assert newest(tmp_path).name == "step-00000006"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    loop.checkpoints.forget()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_writing_takes_at_most_its_fraction_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    written: list[int] = []
    loop = Loop(tmp_path)

    def write(step: int, state: object) -> None:
        written.append(step)
        clock[0] += 0.5

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(loop.checkpoints, "_write", write)
    for step in range(100):
        loop.checkpoints.point(step, {})
        clock[0] += 1.0
    assert written == [0, 25, 50, 75]  # half a second every 25 s is 2 %
    loop.checkpoints.point(100, {}, now=True)
    assert written[-1] == 100


def test_a_product_that_the_checkpoint_lacks_is_deleted(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.checkpoints.point(0, {}, now=True)
    write_text(loop.product, "later")
    assert loop.checkpoints.restore() == {"step": 0}
    assert not loop.product.exists()


def test_a_checkpoint_is_never_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path)
    loop.run(3)
    written: list[Path] = []

    def note(target: Path) -> object:
        written.append(target)
        return replace_folder(target)

    monkeypatch.setattr(checkpoint, "replace_folder", note)
    loop.checkpoints.point(3, {}, now=True)
    assert written == []
    resumed = Loop(tmp_path)
    assert resumed.checkpoints.restore() is not None
    resumed.checkpoints.point(3, {}, now=True)
    assert written == []
    resumed.checkpoints.point(4, {}, now=True)
    assert written[0].name == "step-00000004"


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, each_step: None) -> None:
    loop = Loop(tmp_path)
    loop.run(3)
    before = contents(tmp_path / "checkpoints")

    def full(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "file_digests", full)
        with pytest.raises(OSError, match="disk full"):
            loop.checkpoints.point(4, {}, now=True)
    assert contents(tmp_path / "checkpoints") == before


def test_all_content_is_on_the_disk_before_the_folder_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    sync = files.sync
    rename = os.replace

    def note_sync(path: Path) -> None:
        events.append(("sync", path.name))
        sync(path)

    def note_rename(source: Path, target: Path) -> None:
        events.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(files, "sync", note_sync)
    monkeypatch.setattr(files.os, "replace", note_rename)
    loop = Loop(tmp_path)
    loop.log.write_text("a line\n")
    loop.checkpoints.point(0, {}, now=True)

    renamed = events.index(("rename", "step-00000000"))
    before = {name for _, name in events[:renamed]}
    assert {"log.jsonl", "weights.safetensors", "state.json", "manifest.json"} <= before
    assert ("sync", "checkpoints") in events[renamed + 1 :]
    assert events[0] == ("sync", "log.jsonl")  # the log itself, which lines are appended to, not only its copy


# Stops


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_stop_waits_for_the_next_point_and_leaves_a_checkpoint(
    tmp_path: Path, number: signal.Signals, kind: type[KeyboardInterrupt], capsys: pytest.CaptureFixture[str]
) -> None:
    loop = Loop(tmp_path)
    earlier = signal.getsignal(number)
    reached: list[str] = []

    def steps() -> None:
        with loop.checkpoints.stoppable():
            loop.checkpoints.point(0, {})
            signal.raise_signal(number)
            reached.append("the end of the step")
            loop.checkpoints.point(1, {})
            reached.append("too far")

    with pytest.raises(kind) as stop:
        steps()
    assert stop.type is kind
    assert reached == ["the end of the step"]
    assert newest(tmp_path).name == "step-00000001"
    assert signal.getsignal(number) is earlier
    printed = " ".join(capsys.readouterr().err.split())
    assert "stopping after this step (Ctrl-C again: stop now and lose this step)" in printed


# The real loops


def dying(calls: int) -> Callable[[Sequence[str], Sequence[str]], torch.Tensor]:
    """Return a reward that dies after so many calls."""
    remaining = [calls]

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise Killed
        return share_of_e(prompts, responses)

    return reward


def all_but_timings(run: Path) -> dict[str, object]:
    """Return the content of every file that training wrote, without the seconds it took."""
    result: dict[str, object] = {}
    for path, content in contents(run).items():
        if path.name not in ("metrics.jsonl", "manifest.json"):
            result[str(path)] = content

    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result["metrics"] = [{name: value for name, value in step.items() if "second" not in name} for step in steps]
    return result


def resuming_config() -> Config:
    return loop_config(steps=5, validate_every=2, lr=1e-2, kl_target=0.01, kl_horizon=32, quality_margin=1.0)


@pytest.mark.parametrize(("name", "kind", "often"), [*((*each, True) for each in KINDS), ("t5", "fresh", False)])
def test_training_that_died_ends_equal(
    name: str, kind: str, often: bool, make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", 1e9 if often else 1e-9)
    encoder = "encoder" in kind
    config = resuming_config()
    learn(make_policy(name, kind, encoder), tmp_path / "whole", config)

    # The reward is called by the normaliser, by steps 0 and 1, and by the validations before steps 0 and 2; then the
    # first attempt dies. The second resumes from there.
    for calls in (5, 3):
        with pytest.raises(Killed):
            learn(make_policy(name, kind, encoder), tmp_path / "broken", config, dying(calls))
    last = max((tmp_path / "broken/checkpoints/train").iterdir())
    assert last.name == ("step-00000004" if often else "step-00000001")  # the first one after resuming

    learn(make_policy(name, kind, encoder), tmp_path / "broken", config)
    assert all_but_timings(tmp_path / "broken") == all_but_timings(tmp_path / "whole")


@pytest.mark.parametrize("full_weights", [True, False])
def test_fine_tuning_that_died_ends_equal(
    full_weights: bool, make_policy: Make, bases: dict[str, Path], tmp_path: Path, each_step: None
) -> None:
    pairs = [(row.text, row.references[0]) for row in ROWS["train"]]
    sft = replace(loop_config().sft, steps=6, lr=1e-2, batch_size=8, warmup_steps=2, bf16=False)
    config = replace(loop_config(), sft=sft)

    def tune(folder: Path, die_at: int | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
        losses: list[float] = []

        model = load_base(str(bases["t5"]))[0] if full_weights else make_policy("t5", "loaded").model
        _, tokenizer = load_base(str(bases["t5"]))
        for done, loss in fine_tune(Tuned(model, tokenizer), pairs, config, folder):
            if done == die_at:
                raise Killed
            losses.append(loss)
        return losses, {name: weight.detach().clone() for name, weight in trainable(model).items()}

    losses, weights = tune(tmp_path / "whole")
    with pytest.raises(Killed):
        tune(tmp_path / "broken", die_at=4)
    losses_after, resumed = tune(tmp_path / "broken")
    assert losses[:3] + losses_after == losses  # the dropout masks are those of the step too
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
