"""Several real processes share a run under torchrun, and it is the run that one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import load_file

import small_runs
from conftest import Make, small_config
from detoxrl.commands import resume
from detoxrl.commands import run as commands_run
from detoxrl.errors import InputError
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.runtime.world import World
from detoxrl.training import memory
from detoxrl.training.memory import MemoryPlan
from detoxrl.training.rollout import deal_prompts
from learning import PROMPTS, loop_config
from small_runs import make_place, own, steps_kept, without_timings

REWARD = '''
"""Rewards, and what a test lets happen to one of the processes at a call."""
import os, signal, time

calls = []

def brevity(prompts, responses):
    calls.append(len(responses))
    rank, what, at = os.environ.get("HAPPENS", "-,-,0").split(",")
    now = rank == os.environ.get("RANK", "0") and len(calls) == int(at)
    if now and what == "stop":
        signal.raise_signal(signal.SIGINT)
    if now and what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if now and what == "parent":  # which is the launcher
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(3)
    return [float("nan") if now and what == "fail" else -len(text) / 10 for text in responses]
'''
# The calls of a process: the probe, the normaliser, then in each step a validation and a rollout.
IN_STEP_2 = 2 + 2 * 2 + 2
WORDS = [
    "--reward.function", "ranked.py:brevity", "--reward.terms", "function", "similarity,weight=0.5",
    "--rl.steps", "4", "--rl.epochs", "2", "--rl.kl-target", "0.5",
]  # fmt: skip


def shared_run(number: int, words: Sequence[str], place: Path, happens: str = "") -> tuple[int, str]:
    """Run a command under torchrun in several processes; return its exit code and what stderr said."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    environment = {**os.environ, "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
    if happens:
        environment["HAPPENS"] = happens
    done = subprocess.run(
        [*launcher, "-m", "detoxrl", *words],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    return done.returncode, done.stderr


def detoxrl_lines(stderr: str) -> list[str]:
    """Return the lines in which detoxrl names an error; torchrun adds a report of its own."""
    return [line for line in stderr.splitlines() if line.startswith("detoxrl: ")]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def alike(one: object, other: object) -> None:
    """Fail unless two values of JSON are the same but for rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for name in one:
            alike(one[name], other[name])
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            alike(mine, theirs)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4)
    else:
        assert one == other


def same_run(one: Path, other: Path, measured: bool = True) -> None:
    """Fail unless two runs sampled the same texts, made the same updates and measured the same, if they did."""
    for name in ("rollouts.jsonl", "metrics.jsonl", "validation.jsonl", *(["samples.jsonl"] * measured)):
        alike(without_timings(one / name), without_timings(other / name))
    for name in ("checkpoint.json", "normaliser.json", *(["eval.json"] * measured)):
        found = [json.loads((run / name).read_text()) for run in (one, other)]
        for each in found:
            each.pop("seconds", None)
            each.pop("changed_on_its_way", None)
            each.pop("machine", None)
        alike(*found)
    weights, moments = ([load_file(place_of(run) / f"{name}.safetensors") for run in (one, other)]
                        for name in ("weights", "moments"))  # fmt: skip
    for mine, theirs in (weights, moments):
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


def place_of(run: Path) -> Path:
    return run / f"checkpoints/train/step-{max(steps_kept(run)):08d}"


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], reward_folder: Path) -> Path:
    folder = make_place(tmp_path_factory.mktemp("processes"), bases, reward_folder)
    (folder / "ranked.py").write_text(REWARD)
    return folder


@pytest.fixture
def place(shared_place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shared_place)
    return shared_place


@pytest.fixture
def alone(place: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """The run that one process makes."""
    if not (place / "alone").is_dir():
        assert small_runs.detoxrl(own(*WORDS, "--run-dir", "alone")) == 0
    capfd.readouterr()
    return place / "alone"


def test_two_processes_make_the_run_that_one_makes(place: Path, alone: Path) -> None:
    code, told = shared_run(2, own(*WORDS, "--run-dir", "two", "--track", "tensorboard"), place)
    assert code == 0, told
    assert len([*(place / "two/tensorboard").iterdir()]) == 1  # That of the main process.
    same_run(alone, place / "two")
    assert json.loads((place / "two/run.json").read_text())["machine"]["processes"] == 2
    assert told.count("train: best checkpoint is step") == 1  # Workers are silent.


def test_three_make_it_too_with_another_architecture_a_classifier_and_rows_that_do_not_divide(
    place: Path, bases: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = own("--policy.base", str(bases["gpt2"]), "--policy.lora-targets", "c_attn", "--rl.batch-size", "4")
    # Two rows a minibatch, so that one of three has none.
    words += ["--rl.minibatch-size", "2", "--rl.validation-prompts", "2", "--rl.steps", "2"]
    words += ["--data.max-prompt-tokens", "200"]
    assert small_runs.detoxrl([*words, "--run-dir", "causal"]) == 0
    code, told = shared_run(3, [*words, "--run-dir", "three"], place)
    assert code == 0, told
    same_run(place / "causal", place / "three")
    capfd.readouterr()


@pytest.mark.parametrize("base", ["t5", "gpt2"])
def test_two_share_groups_whose_prompts_are_chosen_by_how_their_responses_differ(
    base: str, place: Path, bases: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = own(*WORDS, "--policy.base", str(bases[base]), "--rl.algorithm", "grpo", "--rl.group-size", "2")
    words += ["--policy.lora-targets", "q" if base == "t5" else "c_attn", "--rl.prompt-sampling", "varied"]
    words += ["--rl.batch-size", "8", "--rl.minibatch-size", "4", "--data.max-prompt-tokens", "200"]
    assert small_runs.detoxrl([*words, "--run-dir", f"{base}-groups"]) == 0
    code, told = shared_run(2, [*words, "--run-dir", f"{base}-groups-of-two"], place)
    assert code == 0, told
    same_run(place / f"{base}-groups", place / f"{base}-groups-of-two")
    capfd.readouterr()


def test_a_killed_process_ends_the_run_in_one_line_and_one_process_resumes_it(
    place: Path, alone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, told = shared_run(2, own(*WORDS, "--run-dir", "killed"), place, f"1,kill,{IN_STEP_2}")
    assert code == 1
    (line,) = detoxrl_lines(told)
    assert line.endswith("resume with `detoxrl run --resume --run-dir killed`")
    resume = ["run", "--resume", "--run-dir", "killed"]
    assert small_runs.detoxrl(resume) == 2  # Another number of processes gives other last digits.
    assert "processes = 1: differs from the run's 2" in capfd.readouterr().err
    assert small_runs.detoxrl([*resume, "--accept-changes"]) == 0
    same_run(alone, place / "killed")


def test_two_resume_what_one_began(place: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stop:
        stop.setenv("HAPPENS", f"0,stop,{IN_STEP_2}")
        assert small_runs.detoxrl(own(*WORDS, "--run-dir", "begun")) == 130
    assert max(steps_kept(place / "begun")) == 3
    code, told = shared_run(2, ["run", "--resume", "--accept-changes", "--run-dir", "begun"], place)
    assert code == 0, told
    same_run(alone, place / "begun")


def test_what_fails_in_one_process_is_one_line_of_the_main_one_and_keeps_the_step(place: Path) -> None:
    code, told = shared_run(2, own(*WORDS, "--run-dir", "failed"), place, f"1,fail,{IN_STEP_2}")
    assert code == 1  # torchrun's, whatever the main process's is.
    (line,) = detoxrl_lines(told)
    assert "returned nan for response 1 of 4" in line
    assert line.endswith("step 2 is kept: resume with `detoxrl run --resume --run-dir failed`")
    assert max(steps_kept(place / "failed")) == 2


def test_bad_input_is_one_line_however_many_there_are(place: Path) -> None:
    code, told = shared_run(2, own("--policy.base", "nowhere", "--run-dir", "bad"), place)
    assert code == 1
    (line,) = detoxrl_lines(told)
    assert line.startswith("detoxrl: policy.base = 'nowhere'")
    assert not (place / "bad").exists()


def test_sigterm_to_the_launcher_keeps_the_step(place: Path) -> None:
    code, told = shared_run(2, own(*WORDS, "--run-dir", "ended"), place, f"0,parent,{IN_STEP_2}")
    assert code != 0
    (line,) = detoxrl_lines(told)
    assert line.endswith("resume with `detoxrl run --resume --run-dir ended`")
    assert max(steps_kept(place / "ended")) == 3


@given(some.integers(1, 40), some.integers(1, 8), some.integers(1, 12), some.randoms())
def test_rows_are_dealt_once_and_evenly(size: int, count: int, number: int, random: object) -> None:
    order = list(range(size * count))
    random.shuffle(order)  # type: ignore[attr-defined]
    minibatches = [order[start : start + size] for start in range(0, len(order), size)]
    dealt = deal_prompts(minibatches, number)
    assert sorted(row for rows in dealt for row in rows) == list(range(size * count))
    assert all(rows == sorted(rows) for rows in dealt)
    for minibatch in (*minibatches, order):
        shares = [len(set(rows) & set(minibatch)) for rows in dealt]
        assert max(shares) - min(shares) <= 1


def test_more_processes_than_rows_and_processes_that_nobody_leads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    monkeypatch.setattr(commands_run, "PartialState", lambda: type("Nine", (), {"num_processes": 9}))
    with pytest.raises(InputError, match="processes = 9: were started, and in Python each would make a run of its own"):
        commands_run.require_one_leader(config, trains=False)

    monkeypatch.setattr(commands_run, "current_world", lambda: World(rank=0, size=9))
    eight, nine = (replace(config, rl=replace(config.rl, batch_size=n, minibatch_size=1)) for n in (8, 9))
    with pytest.raises(InputError, match=r"rl.batch_size = 8: gives 8 prompts a step, fewer than the 9 processes"):
        commands_run.require_one_leader(eight, trains=True)
    commands_run.require_one_leader(eight, trains=False)
    commands_run.require_one_leader(nine, trains=True)
    groups = replace(config, rl=replace(config.rl, batch_size=32, minibatch_size=4, group_size=4))
    with pytest.raises(InputError, match=r"rl.batch_size = 32: gives 8 prompts a step"):
        commands_run.require_one_leader(groups, trains=True)


def test_the_part_of_a_process_decides_whether_keys_and_values_are_kept(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    policy = make_policy("t5", "loaded")
    config = loop_config(batch_size=10, minibatch_size=5, microbatch_size=1)
    cross = memory._update_bytes(policy, PROMPTS[3], config).cross
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 3 * cross + 4)  # A quarter of it holds three.
    for size, kept in ((1, False), (3, False), (4, True), (1, False)):
        world = World(size=size)
        assert MemoryPlan.stored(folder, config, world) is None  # It is chosen again for another number.
        plan = MemoryPlan.choose(policy, PROMPTS, config, world)
        plan.save(folder, config, world)
        assert plan.keep_cross is kept
        assert MemoryPlan.stored(folder, config, world) == plan


def test_threads_are_restored_for_the_same_number_of_processes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        resume._machine_differences({"machine": {"threads": threads + 1}}, loop_config())
        assert torch.get_num_threads() == threads + 1
        resume._machine_differences({"machine": {"processes": 2, "threads": threads}}, loop_config())
        assert torch.get_num_threads() == threads + 1  # Two processes share the cores differently.
    finally:
        torch.set_num_threads(threads)
