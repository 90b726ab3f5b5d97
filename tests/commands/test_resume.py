"""A run that was stopped, by hand, by its reward or by force, goes on through the real command line."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch

from detoxrl import evaluate
from detoxrl.commands import run as stages
from detoxrl.config.edit import config_from_json
from detoxrl.data.embedded.corpus import generate_utterances
from detoxrl.errors import InputError
from detoxrl.models.kernels import Kernels, kernels, using_kernels
from detoxrl.rewards.fit import FitSettings, train_reward_model
from detoxrl.runtime import checkpoint
from detoxrl.runtime import run_folder as tracking
from detoxrl.runtime.checkpoint import Checkpoints
from detoxrl.runtime.randomness import batch_indices
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.runtime.signals import Terminated, stop_signals
from detoxrl.training import finetune
from detoxrl.training.learner import Learner
from small_runs import as_it_was, contents, detoxrl, kept_run, own, same_end, steps_kept, without_timings

WORDS = own("--reward.function", "rewards.py:brevity", "--rl.quality-margin", "1")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], reward_folder: Path) -> Path:
    """A place with a run of three steps in runs/own, in which nothing changes."""
    return kept_run(tmp_path_factory.mktemp("once"), bases, reward_folder, WORDS)


@pytest.fixture
def finished(once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of three steps, as it was then."""
    place = as_it_was(once)
    monkeypatch.chdir(place)
    return place / "runs/own"


@pytest.mark.usefixtures("two_threads")
def test_ctrl_c_keeps_a_state_and_resuming_ends_as_if_nothing_had_happened(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = own("--reward.function", "rewards.py:brevity", "--rl.steps", "5")
    words += ["--rl.kl-target", "0.001", "--rl.kl-horizon", "64"]  # kl_coef moves, so it has to come back too
    assert detoxrl([*words, "--run-dir", "whole"]) == 0
    monkeypatch.setenv("INTERRUPT_AT", "3")  # 0 is the probe, 1 the normaliser, 2 step 0, 3 step 1
    assert detoxrl([*words, "--run-dir", "broken"]) == 130
    told = capfd.readouterr().err
    assert "broken keeps " in told
    assert "resume with `detoxrl run --resume --run-dir broken`" in told
    assert len(without_timings(place / "broken" / "metrics.jsonl")) == 2
    monkeypatch.delenv("INTERRUPT_AT")
    with monkeypatch.context() as crash:  # the resumed run dies after a step more, without a state of its own
        crash.setattr(Checkpoints, "_write", lambda *_: None)
        crash.setenv("FAIL_AT", "2")  # 0 is the probe, 1 step 2, 2 step 3
        assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 2
    assert len(without_timings(place / "broken" / "metrics.jsonl")) == 3
    monkeypatch.setenv("FAIL_AT", "3")
    capfd.readouterr()
    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 2  # step 4, and its state is kept
    told = capfd.readouterr().err.splitlines()[-1]
    assert "returned nan for response 1 of 8" in told
    assert "resume with `detoxrl run --resume --run-dir broken`" in told
    assert steps_kept(place / "broken") == [3, 4]
    monkeypatch.delenv("FAIL_AT")
    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 0
    for name in ("metrics.jsonl", "validation.jsonl", "rollouts.jsonl", "samples.jsonl"):
        assert without_timings(place / "broken" / name) == without_timings(place / "whole" / name), name
    assert steps_kept(place / "broken") == [5]  # with the value head, the moments and the coefficient
    state = [
        f"checkpoints/train/step-00000005/{name}"
        for name in ("weights.safetensors", "moments.safetensors", "state.json")
    ]
    for name in ("adapter", "checkpoint.json", "normaliser.json", *state):
        assert contents(place / "broken" / name) == contents(place / "whole" / name), name


def test_patience_ends_a_run_as_if_it_had_reached_its_steps_and_a_stop_changes_nothing(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a margin of 0 and a learning rate of nothing no policy is better than the start.
    words = own("--reward.function", "rewards.py:brevity", "--rl.steps", "9", "--rl.lr", "1e-12")
    words += ["--rl.validate-every", "2", "--rl.patience", "2"]
    assert detoxrl([*words, "--run-dir", "whole"]) == 0
    assert "train: stopped at step 4 after 2 validations without improvement" in capfd.readouterr().err
    assert "Training stopped early at step 4, after 2 validations" in (place / "whole/report.html").read_text()
    assert json.loads((place / "whole/checkpoint.json").read_text())["stopped_step"] == 4
    assert [line["step"] for line in without_timings(place / "whole/metrics.jsonl")] == [0, 1, 2, 3]
    assert steps_kept(place / "whole") == [4]
    monkeypatch.setenv("INTERRUPT_AT", "4")  # 2 is step 0, 4 step 2, which is validated: one is left
    assert detoxrl([*words, "--run-dir", "broken"]) == 130
    monkeypatch.delenv("INTERRUPT_AT")
    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 0
    same_end(place / "whole", place / "broken")
    RunFolder(place / "broken").write_json("seconds.json", {"prepare": 1.0, "sft": 1.0})  # killed before it said so
    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 0
    same_end(place / "whole", place / "broken")
    more = ["run", "--resume", "--accept-changes", "--run-dir", "broken", "--rl.patience", "None"]
    assert detoxrl(more) == 0  # who has more patience goes on
    assert json.loads((place / "broken/checkpoint.json").read_text())["stopped_step"] is None
    assert steps_kept(place / "broken") == [9]


def test_a_reward_that_fails_in_a_validation_leaves_the_state_before_it(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished.parents[1]
    real, left = Learner.validate, [2]

    def failing(*given: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise InputError("reward.function", "mine", "failed late", "mend it")
        return real(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as fail:
        fail.setattr(Learner, "validate", failing)
        assert detoxrl([*WORDS, "--run-dir", "broken"]) == 2
    assert "failed late; mend it; step 2 is kept: resume with" in capfd.readouterr().err
    assert max(steps_kept(place / "broken")) == 2
    assert [line["step"] for line in without_timings(place / "broken/validation.jsonl")] == [0, 1]
    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 0
    same_end(finished, place / "broken")


@pytest.mark.parametrize("step", [0, 2])
def test_a_reward_that_fails_leaves_the_state_before_its_step(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    place = finished.parents[1]
    monkeypatch.setenv("FAIL_AT", str(2 + step))  # 0 is the probe, 1 the normaliser
    assert detoxrl([*WORDS, "--run-dir", "broken"]) == 2
    monkeypatch.delenv("FAIL_AT")
    assert max(steps_kept(place / "broken")) == step
    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 0
    for name in ("metrics.jsonl", "validation.jsonl", "rollouts.jsonl"):
        assert without_timings(place / "broken" / name) == without_timings(finished / name), name
    capfd.readouterr()


def test_resuming_does_only_what_is_left_and_refuses_other_settings(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = (finished / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    RunFolder(finished).write_json("seconds.json", {"prepare": 1.0, "sft": 1.0, "train": 1.0})
    assert detoxrl([*WORDS, "--resume"]) == 0
    assert (finished / "adapter/adapter_model.safetensors").stat().st_mtime_ns == adapter
    capfd.readouterr()
    assert detoxrl([*WORDS, "--resume", "--data.min-length", "2"]) == 2
    told = "data.min_length = 2: differs from the run's 1, and stage prepare has started with that; leave it out"
    assert told in capfd.readouterr().err


def test_sigterm_is_exit_143_with_a_checkpoint_and_the_line_that_goes_on(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished.parents[1]
    monkeypatch.setenv("STOP_BY", "SIGTERM")
    monkeypatch.setenv("INTERRUPT_AT", "2")
    earlier = signal.getsignal(signal.SIGTERM)
    assert detoxrl([*WORDS, "--run-dir", "broken"]) == 143
    assert signal.getsignal(signal.SIGTERM) is earlier
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("detoxrl: terminated; broken keeps adapter, ")
    assert told.endswith("resume with `detoxrl run --resume --run-dir broken`")
    assert max(steps_kept(place / "broken")) == 1
    monkeypatch.delenv("INTERRUPT_AT")
    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 0
    same_end(finished, place / "broken")


def test_a_measurement_that_was_stopped_goes_on_from_the_responses_it_has(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = own("--generation.batch-size", "3")
    assert detoxrl([*words, "--run-dir", "whole"]) == 0
    append = RunFolder.append

    def stop_signals(folder: RunFolder, name: str, record: dict[str, object]) -> None:
        append(folder, name, record)
        if name == "responses.jsonl" and len(folder.read_lines(name)) == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as stop:
        stop.setattr(RunFolder, "append", stop_signals)
        assert detoxrl([*words, "--run-dir", "broken"]) == 143
    asked: list[int] = []

    def counting(folder: RunFolder, name: str, record: dict[str, object]) -> None:
        append(folder, name, record)
        asked.append(len(record))

    with (place / "broken/responses.jsonl").open("a") as lines:
        lines.write('{"policy": "after", "respon')  # as a kill may leave it
    monkeypatch.setattr(RunFolder, "append", counting)
    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 0
    assert len(asked) == 12  # Of 8 passes for each of before and after: a prompt has more responses than fit into one.
    same_end(place / "whole", place / "broken")
    with monkeypatch.context() as stop:
        stop.setattr(RunFolder, "append", stop_signals)
        assert detoxrl(["evaluate", "broken"]) == 143
    more = ["--evaluation.samples-per-prompt", "3"]  # what it has is of no use then
    assert detoxrl(["run", "--resume", "--run-dir", "broken", *more]) == 0
    assert detoxrl(["run", "--resume", "--run-dir", "whole", *more]) == 0
    same_end(place / "whole", place / "broken")
    capfd.readouterr()


# Longer runs, other settings, other machines


RESUME = ["run", "--resume", "--run-dir", "runs/own"]
ACCEPT = [*RESUME, "--accept-changes"]


def test_a_finished_run_is_made_longer_on_request_and_says_so(
    once: Path, finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished.parents[1]
    before = contents(finished)
    assert detoxrl([*RESUME, "--rl.steps", "5", "--rl.lr", "2e-2"]) == 2
    told = capfd.readouterr().err
    assert "rl.steps = 5: differs from the run's 3, so resuming would not reproduce an uninterrupted run" in told
    assert "also different: rl.lr = 0.02 (was 0.01); add --accept-changes to resume anyway" in told
    assert contents(finished) == before
    assert detoxrl([*ACCEPT, "--rl.steps", "5"]) == 0
    assert steps_kept(finished) == [5]
    lines = without_timings(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[3]["lr"] == pytest.approx(1e-2 * (1 - 3 / 5))
    record = {"stage": "train", "step": 3, "changes": {"rl.steps": [3, 5]}}
    assert json.loads((finished / "eval.json").read_text())["changed_on_its_way"] == [record]
    assert "rl.steps" in (finished / "report.html").read_text().split("Settings changed during this run")[1][:300]
    finished.rename(place / "longer")
    # The same again, but killed on its way: it ends the same.
    copytree(once / "runs/own", finished)
    monkeypatch.setenv("INTERRUPT_AT", "2")
    assert detoxrl([*ACCEPT, "--rl.steps", "5"]) == 130
    assert not (finished / "eval.json").exists()
    monkeypatch.delenv("INTERRUPT_AT")
    assert detoxrl(RESUME) == 0
    same_end(place / "longer", finished)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--rl.lr", "1e-3"],
            r"rl\.lr = 0\.001: comes too late: the run has made 3 steps; leave it out, or ask for more",
        ),
        (
            ["--rl.steps", "2"],
            r"rl\.steps = 2: comes too late: .*; leave it out, .*, for example --rl\.steps 6",
        ),
        (
            ["--data.limit", "30"],
            r"data\.limit = 30: differs from the run's 24000, and stage prepare has started with that",
        ),
        (
            ["--policy.lora-rank", "8"],
            r"policy\.lora_rank = 8: differs from the run's 32, and stage sft has started",
        ),
        (
            ["--reward.clip", "1"],
            r"reward\.clip = 1\.0: differs from the run's 10\.0, and stage sft has started",
        ),
        (
            ["--rl.algorithm", "reinforce", "--rl.steps", "6"],
            r"rl\.algorithm = 'reinforce': differs from the run's 'ppo', and only one of the two has a critic; leave",
        ),
        (["--seed", "1"], r"seed = 1: differs from the run's 0, .*; leave it out \(--resume --run-dir DIR keeps it"),
    ],
)
def test_what_cannot_change_any_more_is_refused_even_so(
    finished: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = contents(finished)
    assert detoxrl([*ACCEPT, *words]) == 2
    told = capfd.readouterr().err
    assert len(told.splitlines()) == 1
    assert re.search(message, told), told
    assert contents(finished) == before


def test_a_run_from_before_a_setting_existed_ran_as_its_default_says(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(finished)
    record = folder.read_json("run.json")
    for name in ("rl.algorithm", "rl.group_size", "rl.tail_share"):
        del record["settings"][name]
    folder.write_json("run.json", record)
    assert detoxrl(RESUME) == 0
    assert detoxrl([*RESUME, "--rl.algorithm", "reinforce"]) == 2
    assert "rl.algorithm = 'reinforce': differs from the run's 'ppo'" in capfd.readouterr().err


def test_what_no_stage_has_used_yet_changes_freely(finished: Path) -> None:
    place = finished.parents[1]
    assert detoxrl([*RESUME, "--evaluation.samples-per-prompt", "3"]) == 0
    assert json.loads((finished / "run.json").read_text())["changes"] == []
    prepared = own("--reward.function", "rewards.py:brevity", "--run-dir", "prepared")
    assert detoxrl(["prepare", *prepared[1:]]) == 0
    more = ["--rl.quality-margin", "1", "--evaluation.samples-per-prompt", "3"]
    assert detoxrl(["run", "--resume", "--run-dir", "prepared", *more]) == 0
    same_end(finished, place / "prepared")
    assert json.loads((finished / "eval.json").read_text())["samples_per_prompt"] == 3


def test_another_machine_or_reward_file_is_named_and_threads_are_taken_over(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = finished.parents[1]
    folder = RunFolder(finished)
    account = folder.read_json("run.json")
    machine = account["machine"]
    threads = torch.get_num_threads()
    assert machine["threads"] == threads
    others = 3 - threads
    folder.write_json("run.json", account | {"machine": machine | {"torch": "2.0.0", "threads": others}})
    assert detoxrl(RESUME) == 0  # nothing is left to do
    folder.write_json("seconds.json", {"prepare": 1.0, "sft": 1.0, "train": 1.0})
    assert detoxrl(RESUME) == 2
    assert f"torch = '{torch.__version__.partition('+')[0]}" in capfd.readouterr().err
    folder.write_json("run.json", account | {"machine": machine | {"threads": others}})
    try:
        for words in (RESUME, ["evaluate", "runs/own"]):
            torch.set_num_threads(threads)
            assert detoxrl(words) == 0
            assert torch.get_num_threads() == others
            assert f"{others} threads" in json.loads((finished / "eval.json").read_text())["machine"]
    finally:
        torch.set_num_threads(threads)
    folder.write_json("run.json", account)
    (place / "rewards.py").write_text((place / "rewards.py").read_text() + "\n# mended\n")
    folder.write_json("seconds.json", {"prepare": 1.0, "sft": 1.0, "train": 1.0})
    assert detoxrl(RESUME) == 2
    assert "content of reward.function" in capfd.readouterr().err
    assert detoxrl(ACCEPT) == 0
    assert "content of reward.function" in (finished / "run.json").read_text()
    assert "Before evaluate resumed: content of reward.function" in (finished / "report.html").read_text()
    assert detoxrl(["evaluate", "runs/own"]) == 0  # made anew as a whole, so nothing changed on its way
    assert json.loads((finished / "eval.json").read_text())["changed_on_its_way"] == []
    assert detoxrl(RESUME) == 0


def test_a_run_in_use_is_refused(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunFolder(finished).locked():
        for words in (RESUME, ["evaluate", "runs/own"], own("--overwrite")):
            assert detoxrl(words) == 2
            assert "run folder = 'runs/own': is in use by another process; wait for it" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["--policy.full-weights"], ["--sft.steps", "5"]])
def test_the_disk_that_is_foretold_is_what_a_run_holds_at_most(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    sizes: list[int] = []
    forget = Checkpoints.forget

    def note(checkpoints: Checkpoints, keep: int = 0) -> None:
        sizes.append(sum(path.stat().st_size for path in (place / "runs/own").rglob("*") if path.is_file()))
        forget(checkpoints, keep)

    monkeypatch.setattr(Checkpoints, "forget", note)
    assert detoxrl(["doctor", *own(*words)[1:]]) == 0
    shown = capfd.readouterr().out
    found = re.search(r"disk: up to ([\d.]+) MiB in runs/own, 0 MiB to fetch", shown)
    assert found, shown
    assert not (place / "runs").exists()
    assert detoxrl(own(*words)) == 0
    assert 0.6 < max(sizes) / 2**20 / float(found[1]) < 1.12  # of a tenth that is rounded


def test_changes_are_checked_before_anything_is_written(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepared = own("--reward.function", "rewards.py:brevity", "--run-dir", "runs/own")
    assert detoxrl(["prepare", *prepared[1:]]) == 0
    before = contents(place / "runs/own")
    assert detoxrl([*RESUME, "--reward.function", "rewards.py:nosuch"]) == 2
    assert "defines no function nosuch" in capfd.readouterr().err
    assert detoxrl([*RESUME, "--evaluation.primary-judge", "nowhere"]) == 2
    assert contents(place / "runs/own") == before


def test_a_machine_that_changed_during_the_warm_start_stays_in_the_account(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = own("--sft.steps", "6", "--sft.no-full-weights", "--run-dir", "runs/own")
    with monkeypatch.context() as stop:
        stop.setattr(
            finetune, "batch_indices", lambda *given: signal.raise_signal(signal.SIGTERM) or batch_indices(*given)
        )
        assert detoxrl(words) == 143  # after the first step, with a checkpoint
    assert (place / "runs/own/checkpoints/sft/start/step-00000001").is_dir()
    folder = RunFolder(place / "runs/own")
    account = folder.read_json("run.json")
    folder.write_json("run.json", account | {"machine": account["machine"] | {"torch": "2.0.0"}})
    assert detoxrl(RESUME) == 2
    assert detoxrl(ACCEPT) == 0
    (record,) = folder.read_json("eval.json")["changed_on_its_way"]
    assert (record["stage"], list(record["changes"])) == ("sft", ["torch"])
    assert detoxrl(RESUME) == 0
    capfd.readouterr()


@pytest.mark.parametrize("step", [3, 9])  # 9 is the last
def test_a_reward_model_in_training_waits_for_the_end_of_its_step(tmp_path: Path, step: int) -> None:
    def stop(done: int, loss: float) -> None:
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        train_reward_model(
            generate_utterances(0, 64),
            tmp_path / "model",
            tmp_path / "checkpoints",
            FitSettings(steps=9, batch_size=8, lr=1e-3, seed=0),
            on_step=stop,
        )
    assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) == f"step-{step:08d}"


class Killed(BaseException):
    """What no code of ours catches."""


def killing(monkeypatch: pytest.MonkeyPatch, place: object, name: str, calls: int) -> None:
    """Let the call of a function after `calls` others be the last thing that happens."""
    real, left = getattr(place, name), [calls]

    def deadly(*given: object, **named: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*given, **named)

    monkeypatch.setattr(place, name, deadly)


@pytest.mark.parametrize("calls", range(4))
@pytest.mark.parametrize("words", [["train", "runs/own"], ["run", "--overwrite"]], ids=["train", "overwrite"])
def test_what_is_killed_while_it_makes_room_can_go_on(
    finished: Path, monkeypatch: pytest.MonkeyPatch, calls: int, words: list[str]
) -> None:
    place = finished.parents[1]
    finished.rename(place / "whole")
    copytree(place / "whole", finished)
    with monkeypatch.context() as deadly:
        killing(deadly, tracking, "remove_path", calls)
        with pytest.raises(Killed):
            detoxrl([*WORDS, "--overwrite"] if words[0] == "run" else words)
    assert detoxrl(RESUME) == 0
    same_end(place / "whole", finished)


def test_training_again_is_refused_without_its_warm_start_and_goes_on_with_what_it_began(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished.parents[1]
    (place / "rewards.py").write_text((place / "rewards.py").read_text() + "\n# mended\n")
    monkeypatch.setenv("INTERRUPT_AT", "2")
    assert detoxrl(["train", "runs/own"]) == 130
    monkeypatch.delenv("INTERRUPT_AT")
    assert detoxrl(RESUME) == 0  # all of the training was by the mended file
    RunFolder(finished).write_json("seconds.json", {"prepare": 1.0})
    before = contents(finished)
    assert detoxrl(["train", "runs/own"]) == 2
    assert "has not finished sft; run `detoxrl sft runs/own` first, or use --resume" in capfd.readouterr().err
    (finished / "data/train.jsonl").write_text("{")
    assert detoxrl(["sft", "runs/own"]) == 1
    assert "remove seconds.json, and --resume makes the rows again" in capfd.readouterr().err
    assert {**contents(finished), Path("data/train.jsonl"): b""} == {**before, Path("data/train.jsonl"): b""}
    (finished / "seconds.json").unlink()
    assert detoxrl(RESUME) == 0
    assert contents(finished)[Path("data/train.jsonl")] == before[Path("data/train.jsonl")]


def test_a_measurement_that_was_stopped_before_it_began_does_not_train(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as deadly:
        killing(deadly, stages, "write_prepared", 0)
        with pytest.raises(Killed):
            evaluate("measured", config_from_json(finished / "config.json"), policies={"it": finished / "adapter"})
    assert detoxrl(["run", "--resume", "--run-dir", "measured"]) == 2
    assert "and was stopped before it began; measure it again, with overwrite" in capfd.readouterr().err


def test_a_resumed_run_multiplies_as_it_began(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(finished)
    account = folder.read_json("run.json")
    machine = account["machine"]
    used = kernels()
    assert machine["kernels"] == asdict(used)
    others = replace(used, packed=not used.packed)
    folder.write_json("run.json", account | {"machine": machine | {"kernels": asdict(others)}})
    folder.write_json("seconds.json", {"prepare": 1.0, "sft": 1.0, "train": 1.0})
    with using_kernels(used):
        assert detoxrl(RESUME) == 0
        assert kernels() == others

    elsewhere = machine | {"kernels": asdict(others), "processor": "of another kind"}
    folder.write_json("run.json", account | {"machine": elsewhere})
    folder.write_json("seconds.json", {"prepare": 1.0, "sft": 1.0, "train": 1.0})
    capfd.readouterr()
    with using_kernels(used):
        assert detoxrl(RESUME) == 2
        assert kernels() == used
    assert "also different: kernels = " in capfd.readouterr().err


def test_the_kernels_of_an_earlier_version_went_by_the_processors_name(finished: Path) -> None:
    folder = RunFolder(finished)
    account = folder.read_json("run.json")
    del account["machine"]["kernels"]
    folder.write_json("run.json", account)
    folder.write_json("seconds.json", {"prepare": 1.0, "sft": 1.0, "train": 1.0})
    with using_kernels(kernels()):
        assert detoxrl(RESUME) == 0
        had_onednn = torch.backends.cpu.get_cpu_capability() == "AVX512"
        assert kernels() == Kernels(onednn=had_onednn, packed=had_onednn, bf16=True)


def test_a_run_folder_without_an_account_is_one_of_an_unknown_machine(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (finished / "run.json").unlink()
    found = json.loads((finished / "eval.json").read_text())
    del found["changed_on_its_way"]
    RunFolder(finished).write_json("eval.json", found)
    assert detoxrl(RESUME) == 0
    assert detoxrl(["evaluate", "runs/own"]) == 0
    (finished / "run.json").unlink()
    RunFolder(finished).write_json("seconds.json", {"prepare": 1.0, "sft": 1.0})
    assert detoxrl(RESUME) == 2
    assert f"threads = {torch.get_num_threads()}: differs from the run's None" in capfd.readouterr().err
    assert detoxrl(ACCEPT) == 0


def test_a_longer_run_needs_a_checkpoint(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rmtree(finished / "checkpoints")
    assert detoxrl([*ACCEPT, "--rl.steps", "9"]) == 2
    assert "rl.steps = 9: needs a checkpoint to resume from, and there is none; start over" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_python_swallows_is_raised_at_the_end() -> None:
    class Deaf:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    reached: list[str] = []

    def work() -> None:
        with stop_signals():
            Deaf()
            reached.append("what came is not lost")

    with pytest.raises(Terminated):
        work()
    assert reached
