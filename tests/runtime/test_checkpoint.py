"""A loop that is stopped goes on from its newest whole state, and ends as if it had never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import KINDS, Make, prompted_rows
from detoxrl.config.schema import Config
from detoxrl.errors import StorageError
from detoxrl.models.loading import load_base
from detoxrl.runtime import checkpoint
from detoxrl.runtime import files as storage
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.files import replace_folder, write_text
from detoxrl.runtime.signals import Terminated, stop_signals
from detoxrl.training.sft import fine_tune
from small_runs import contents
from test_invariants import learn, loop_config, share_of_e

ROWS = prompted_rows(0, {"train": 24})


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints cost nothing, so there is one at every step."""
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)


class Loop:
    """A loop over one weight: each step adds 1, writes the sum to a product and a line to a log."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.product, self.folder, self.log = root / "product", root / "folder", root / "log.jsonl"
        self.checkpoints = Checkpoints(
            root / "checkpoints", {"w": self.weight}, self.optimizer, [self.product, self.folder, self.log]
        )

    def run(self, steps: int, die_at: int | None = None) -> int:
        """Make the steps that are left and return how many those were; die in the middle of `die_at`."""
        state = self.checkpoints.restore() or {"step": 0, "seen": []}
        first, seen = state["step"], state["seen"]
        for step in range(first, steps + 1):
            self.checkpoints.point(step, {"seen": seen}, now=step == steps)
            if step == steps:
                break
            (self.weight * (step + 1)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            seen = [*seen, step]
            write_text(self.product, str(self.weight.tolist()))
            with replace_folder(self.folder) as place:
                (place / "part").write_text(str(step))
            with self.log.open("a") as lines:
                lines.write(json.dumps({"step": step, "seen": seen}) + "\n")
            if step == die_at:
                raise Killed
        return steps - first


def unbroken(root: Path, steps: int = 6) -> dict[Path, bytes]:
    Loop(root).run(steps)
    return contents(root)


@pytest.mark.parametrize("die_at", range(6))
def test_a_loop_that_died_ends_equal(tmp_path: Path, each_step: None, die_at: int) -> None:
    with pytest.raises(Killed):
        Loop(tmp_path / "broken").run(6, die_at)
    assert Loop(tmp_path / "broken").run(6) == 6 - die_at
    assert contents(tmp_path / "broken") == unbroken(tmp_path / "whole")


def newest(root: Path) -> Path:
    return max(path for path in (root / "checkpoints").iterdir() if path.suffix == "")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn weights": (lambda root: cut(newest(root) / "weights.safetensors"), "weights.safetensors differs"),
    "edited weights": (lambda root: flip(newest(root) / "weights.safetensors"), "weights.safetensors differs"),
    "edited moments": (lambda root: flip(newest(root) / "moments.safetensors"), "moments.safetensors differs"),
    "edited state": (lambda root: (newest(root) / "state.json").write_text("{}"), "state.json differs"),
    "edited product": (lambda root: flip(newest(root) / "products/folder/part"), "products/folder/part differs"),
    "one file more": (lambda root: (newest(root) / "more").touch(), "more differs"),
    "one file less": (lambda root: (newest(root) / "products/product").unlink(), "products/product differs"),
    "no manifest": (lambda root: (newest(root) / "manifest.json").unlink(), "manifest.json: "),
    "torn manifest": (lambda root: cut(newest(root) / "manifest.json"), "manifest.json: "),
    "odd manifest": (lambda root: (newest(root) / "manifest.json").write_text("7"), "manifest.json: "),
    "shorter log": (lambda root: os.truncate(newest(root) / "products/log.jsonl", 60), "log.jsonl differs"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_state_is_named_and_the_one_before_is_taken(
    tmp_path: Path, each_step: None, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    with pytest.raises(Killed):
        Loop(tmp_path / "broken").run(6, die_at=3)
    assert [path.name for path in sorted((tmp_path / "broken/checkpoints").iterdir())] == [
        "step-00000002", "step-00000003",
    ]  # fmt: skip
    (tmp_path / "broken/checkpoints/step-00000003.bak").mkdir()  # a user's own
    harm, told = DAMAGE[damage]
    harm(tmp_path / "broken")
    assert Loop(tmp_path / "broken").run(6) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "step-00000003 is not as it was written" in said
    assert told in said
    (tmp_path / "broken/checkpoints/step-00000003.bak").rmdir()
    assert contents(tmp_path / "broken") == unbroken(tmp_path / "whole")


def test_without_a_whole_state_nothing_is_lost_unasked(tmp_path: Path, each_step: None) -> None:
    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        Loop(broken).run(6, die_at=3)
    whole = contents(broken)
    for state in (broken / "checkpoints").iterdir():
        cut(state / "weights.safetensors")
    before = contents(broken)
    with pytest.raises(StorageError, match=r"3 is not as it was written \(weights.safetensors differs\); put"):
        Loop(broken).run(6)
    assert contents(broken) == before
    for path, content in whole.items():
        (broken / path).write_bytes(content)
    (broken / "log.jsonl").unlink()  # the state holds it
    assert Loop(broken).run(6) == 3
    assert contents(broken) == unbroken(tmp_path / "whole")
    shutil.rmtree(broken / "checkpoints")  # as the message says
    assert Loop(broken).run(6) == 6
    assert contents(broken) == contents(tmp_path / "whole")


def test_two_states_are_kept_and_in_the_end_as_many_as_are_asked_for(tmp_path: Path, each_step: None) -> None:
    loop = Loop(tmp_path)
    loop.run(6)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    loop.checkpoints.forget(keep=1)
    assert newest(tmp_path).name == "step-00000006"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    loop.checkpoints.forget()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_states_take_at_most_their_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [100.0], list[int]()
    loop = Loop(tmp_path)

    def write(step: int, state: object) -> None:
        written.append(step)
        now[0] += 0.5

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop.checkpoints, "_write", write)
    for step in range(100):
        loop.checkpoints.point(step, {})
        now[0] += 1.0
    assert written == [0, 25, 50, 75]  # half a second in 25
    loop.checkpoints.point(100, {}, now=True)
    assert written[-1] == 100


def test_a_product_that_came_later_is_gone_again(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.checkpoints.point(0, {}, now=True)
    write_text(loop.product, "later")
    assert loop.checkpoints.restore() == {"step": 0}
    assert not loop.product.exists()


def test_a_state_is_never_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, written = Loop(tmp_path), list[Path]()
    loop.run(3)

    def note(target: Path) -> object:
        written.append(target)
        return replace_folder(target)

    monkeypatch.setattr(checkpoint, "filling", note)
    loop.checkpoints.point(3, {}, now=True)
    assert written == []
    again = Loop(tmp_path)
    assert again.checkpoints.restore() is not None
    del written[:]  # the product that was put back
    again.checkpoints.point(3, {}, now=True)
    assert written == []
    again.checkpoints.point(4, {}, now=True)
    assert written[0].name == "step-00000004"


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, each_step: None) -> None:
    loop = Loop(tmp_path)
    loop.run(3)
    before = contents(tmp_path / "checkpoints")

    def full(step: int) -> None:
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "file_digests", full)
        with pytest.raises(OSError, match="disk full"):
            loop.checkpoints.point(4, {}, now=True)
    assert contents(tmp_path / "checkpoints") == before


def test_everything_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    sync, replace_name = storage.sync, os.replace

    def note_sync(path: Path) -> None:
        events.append(("sync", path.name))
        sync(path)

    def note_replace(source: Path, target: Path) -> None:
        events.append(("name", Path(target).name))
        replace_name(source, target)

    monkeypatch.setattr(storage, "sync", note_sync)
    monkeypatch.setattr(storage.os, "replace", note_replace)
    loop = Loop(tmp_path)
    loop.log.write_text("a line\n")
    loop.checkpoints.point(0, {}, now=True)
    named = events.index(("name", "step-00000000"))
    before, after = events[:named], events[named + 1 :]
    assert {"log.jsonl", "weights.safetensors", "state.json", "manifest.json"} <= {name for _, name in before}
    assert ("sync", "checkpoints") in after
    assert events[0] == ("sync", "log.jsonl")  # where it is appended to, not only its copy


# Stops


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_stop_waits_for_the_next_point_and_leaves_a_state(
    tmp_path: Path, number: signal.Signals, kind: type[KeyboardInterrupt], capsys: pytest.CaptureFixture[str]
) -> None:
    loop, earlier, reached = Loop(tmp_path), signal.getsignal(number), list[str]()

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
    assert "stopping at the end of this step, which is kept" in " ".join(capsys.readouterr().err.split())


def test_what_is_ignored_stays_ignored() -> None:
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts its background jobs
    try:
        with stop_signals(print) as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked() is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_in_another_thread_signals_stay_as_they_are() -> None:
    asked: list[object] = []

    def work() -> None:
        with stop_signals(print) as stop:
            asked.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [None]


def test_a_second_stop_is_at_once_and_one_after_the_last_point_is_not_lost() -> None:
    said: list[str] = []

    def stopped(*numbers: signal.Signals) -> None:
        with stop_signals(said.append) as asked:
            assert asked() is None
            for number in numbers:
                signal.raise_signal(number)
                assert asked() is KeyboardInterrupt
            said.append("ended")

    with pytest.raises(Terminated):
        stopped(signal.SIGINT, signal.SIGTERM)
    assert len(said) == 1
    with pytest.raises(KeyboardInterrupt):
        stopped(signal.SIGINT)
    assert len(said) == 3
    assert said[-1] == "ended"


# The real loops


def dying(calls: int) -> Callable[[Sequence[str], Sequence[str]], torch.Tensor]:
    left = [calls]

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return share_of_e(prompts, responses)

    return reward


def everything(run: Path) -> dict[str, object]:
    """What a training leaves, timings aside."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, object] = {
        str(path): content
        for path, content in contents(run).items()
        if path.name not in ("metrics.jsonl", "manifest.json")
    }
    return found | {"metrics": [{k: v for k, v in line.items() if "second" not in k} for line in lines]}


def resuming_config() -> Config:
    return loop_config(steps=5, validate_every=2, lr=1e-2, kl_target=0.01, kl_horizon=32, quality_margin=1.0)


@pytest.mark.parametrize(("name", "kind", "often"), [*((*each, True) for each in KINDS), ("t5", "fresh", False)])
def test_a_training_that_died_ends_equal(
    name: str, kind: str, often: bool, make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", 1e9 if often else 1e-9)
    encoder, config = "encoder" in kind, resuming_config()
    learn(make_policy(name, kind, encoder), tmp_path / "whole", config)
    for calls in (5, 3):  # the normaliser's, steps 0 and 1, validations before steps 0 and 2; then on from there
        with pytest.raises(Killed):
            learn(make_policy(name, kind, encoder), tmp_path / "broken", config, dying(calls))
    newest = max((tmp_path / "broken/checkpoints/train").iterdir())
    assert newest.name == ("step-00000004" if often else "step-00000001")  # the first after going on
    learn(make_policy(name, kind, encoder), tmp_path / "broken", config)
    assert everything(tmp_path / "broken") == everything(tmp_path / "whole")


@pytest.mark.parametrize("whole", [True, False])
def test_a_fine_tuning_that_died_ends_equal(
    whole: bool, make_policy: Make, bases: dict[str, Path], tmp_path: Path, each_step: None
) -> None:
    pairs = [(row.dialogue, row.summary or "") for row in ROWS["train"]]
    config = replace(loop_config().sft, steps=6, lr=1e-2, batch_size=8, warmup_steps=2, bf16=False)

    def tune(place: Path, die_at: int | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
        losses: list[float] = []

        def note(done: int, loss: float) -> None:
            if done == die_at:
                raise Killed
            losses.append(loss)

        model = load_base(str(bases["t5"]))[0] if whole else make_policy("t5", "loaded").model
        fine_tune(model, load_base(str(bases["t5"]))[1], pairs, config, 0, place, note)
        return losses, {name: weight.detach().clone() for name, weight in trainable(model).items()}

    losses, weights = tune(tmp_path / "whole")
    with pytest.raises(Killed):
        tune(tmp_path / "broken", die_at=4)
    rest, resumed = tune(tmp_path / "broken")
    assert losses[:3] + rest == losses  # dropout too is that of the step
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
