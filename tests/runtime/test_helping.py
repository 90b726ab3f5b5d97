"""What processes do together, in forked ones that join as a launcher's do; tests/test_processes.py starts real ones."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

from conftest import Make
from detoxrl.commands import launching
from detoxrl.commands import resume as changes
from detoxrl.commands import run as stages
from detoxrl.errors import InputError, ProcessError
from detoxrl.rewards.shaping import Normaliser
from detoxrl.runtime import processes
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training import helping, memory
from detoxrl.training.memory import MemoryPlan
from test_invariants import PROMPTS, learn, loop_config


def forked(command: Callable[[], object], number: int = 2) -> list[str]:
    """Return how `led` ended in each of so many processes: what the main one's command returned, or what it raised."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(number)]

    def work(rank: int) -> None:
        named = {
            **place,
            "WORLD_SIZE": number,
            "LOCAL_WORLD_SIZE": number,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "OMP_NUM_THREADS": 1,
        }
        os.environ |= {name: str(value) for name, value in named.items()}
        torch.set_num_threads(1)  # threads of the parent's pool are not here
        PartialState._reset_state()
        returned = list[object]()
        try:
            helping.led(lambda: returned.append(command()))
            ended = str(*returned) if returned else "done"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1].name
            ended = f"{type(error).__name__} in {where}: {error}"
        names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
        # A sharded base holds on to the group that it is gathered by.
        left = dist.is_initialized() or ("pt_gloo_runloop" in names and processes.sharding() is None)
        pipes[rank][1].send(ended + (", still in a group" if left else ""))

    workers = [context.Process(target=work, args=(rank,)) for rank in range(number)]
    for worker in workers:
        worker.start()
    try:
        for (reader, _), worker in zip(pipes, workers, strict=True):
            wait([reader, worker.sentinel], 60)
        return [reader.recv() if reader.poll() else "nothing in a minute" for reader, _ in pipes]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def on_helper(do: Callable[[], object]) -> Callable[..., object]:
    """Return a function that does it in every process but the main one."""
    return lambda *_: do() if processes._here.rank > 0 else None


def refuse() -> NoReturn:
    raise InputError("policy.adapter", "there", "is no folder here", "copy it")


def test_a_helpers_input_error_outside_what_is_gathered_is_the_main_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(seconds: float) -> None:
        assert not dist.is_initialized(), "the main one notices too late"

    monkeypatch.setitem(helping._ALWAYS, "measure", refuse)
    monkeypatch.setattr(time, "sleep", wait)

    def command() -> None:
        processes.tell("measure")
        processes.everyone("the main one's part")

    main, helper = forked(command)
    assert main == "InputError in _connected: policy.adapter = 'there': is no folder here; copy it"
    assert helper.startswith("InputError in refuse: ")


def test_what_fails_in_an_update_is_noticed_before_gradients_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise ValueError("sizes do not match")

    def wait(_: torch.Tensor) -> NoReturn:
        raise AssertionError("NCCL would wait here")

    monkeypatch.setitem(helping._ALWAYS, "measure", fail)
    monkeypatch.setattr(dist, "all_reduce", wait)

    def command() -> None:
        processes.tell("measure")
        processes.sum_gradients([torch.nn.Parameter(torch.zeros(2))])

    main, helper = forked(command)
    assert main == "ProcessError in _connected: process 1 of this run failed: ValueError: sizes do not match"
    assert helper == "ValueError in fail: sizes do not match"


def test_the_main_ones_own_error_ends_the_helpers_and_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(helping._ALWAYS, "measure", lambda: processes.gather(lambda: None))

    def command() -> None:
        processes.tell("measure")
        processes.gather(refuse)

    main, helper, other = forked(command, 3)
    assert main == "InputError in refuse: policy.adapter = 'there': is no folder here; copy it"
    for told in (helper, other):
        assert told.startswith("ProcessError in _connected: a process of this run was lost: ")


def test_helpers_keep_what_is_freed_and_all_leave_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[bool]()
    monkeypatch.setattr(helping, "keep_freed", lambda: kept.append(True))
    monkeypatch.setitem(helping._ALWAYS, "measure", lambda: processes.everyone(kept))

    def command() -> list[list[bool]]:
        processes.tell("measure")
        return processes.everyone(kept)

    assert forked(command) == ["[[], [True]]", "done"]


def told(monkeypatch: pytest.MonkeyPatch, *tasks: tuple[Any, ...]) -> None:
    """Let this process be told some tasks."""
    monkeypatch.setattr(processes, "told", iter([*tasks, ("end",)]).__next__)


def test_helpers_take_the_threads_of_a_run_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, said = torch.get_num_threads(), list[Any]()
    monkeypatch.setattr(processes, "tell", lambda *task: said.append(task))
    try:
        changes._machine_differences({"machine": {"threads": threads + 1}}, loop_config())
        assert torch.get_num_threads() == threads + 1
        torch.set_num_threads(threads)
        told(monkeypatch, *said)
        helping._help()
        assert torch.get_num_threads() == threads + 1
        said.clear()
        changes._machine_differences({"machine": {"processes": 2, "threads": threads}}, loop_config())
        assert (said, torch.get_num_threads()) == ([], threads + 1)  # others share the cores otherwise
    finally:
        torch.set_num_threads(threads)


def test_helpers_let_go_of_what_was_trained_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weights:
        pass

    made, alive = list["weakref.ref[Weights]"](), list[int]()

    def training(*_: object) -> helping.Tasks:
        alive.append(sum(ref() is not None for ref in made))
        weights = Weights()
        made.append(weakref.ref(weights))
        return {"step": lambda: alive.append(weights is made[-1]())}

    def measured(*_: object) -> Iterable[object]:
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        return ()

    monkeypatch.setattr(helping, "_training", training)
    monkeypatch.setattr(helping, "sampled", measured)
    told(monkeypatch, ("train",), ("step",), ("train",), ("step",), ("measure",))
    helping._help()
    assert alive == [0, True, 0, True, 0]


def test_a_step_is_told_what_a_helper_reads_of_it(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[Any]()
    monkeypatch.setattr(processes, "tell", lambda *task: said.append(task))
    learn(make_policy("t5", "fresh"), tmp_path, loop_config())
    (kinds,) = {tuple(map(type, given)) for what, *given in said if what == "step"}
    assert kinds == (Normaliser, int, float, MemoryPlan)


def test_the_share_of_a_process_decides_whether_keys_and_values_are_kept(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, policy = RunFolder(tmp_path), make_policy("t5", "loaded")
    config = loop_config(batch_size=10, minibatch_size=5, microbatch_size=1)
    cross, _ = memory._bytes_per_response(policy, PROMPTS[3], config)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 3 * cross + 4)  # a quarter of it holds three
    for count, kept in ((1, False), (3, False), (4, True), (1, False)):  # chosen anew for another number
        monkeypatch.setattr(processes, "_here", processes._Here(count=count))
        assert MemoryPlan.of(folder, policy, PROMPTS, config).keep_cross is kept
    monkeypatch.setattr(processes, "sharding", lambda: object())  # and where the base is in pieces
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**12)
    assert MemoryPlan.of(folder, policy, PROMPTS, config).keep_cross is True


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)

    def meet(**how: bool) -> NoReturn:
        raise ProcessError(f"on CPUs: {how['cpu']}")

    monkeypatch.setattr(processes, "PartialState", meet)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE = 3: is above the number of GPUs of this machine, 2; start"):
        processes.join()
    for name, value, on_cpu in (("LOCAL_WORLD_SIZE", "2", False), ("ACCELERATE_USE_CPU", "true", True)):
        monkeypatch.setenv(name, value)
        with pytest.raises(ProcessError, match=f"on CPUs: {on_cpu}"):
            processes.join()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")


def test_rows_of_a_step_bound_processes_that_train_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "PartialState", lambda: type("Nine", (), {"num_processes": 9}))
    monkeypatch.setattr(processes, "_here", processes._Here(count=9))
    folder, config = RunFolder(tmp_path), loop_config(batch_size=8, minibatch_size=4)
    config = replace(config, policy=replace(config.policy, base=str(tmp_path)))
    monkeypatch.setattr(RunFolder, "open", lambda root: (folder, config))
    with pytest.raises(InputError, match=r"rl.batch_size = 8: is below the number of processes, 9"):
        stages.rerun_stage(tmp_path, "train")
    with pytest.raises(InputError, match=r"rl.batch_size = 8: "):
        stages.prepare(tmp_path, config)
    monkeypatch.setattr(stages, "_new", lambda *_: refuse())
    with pytest.raises(InputError, match="no folder here"):
        stages.evaluate(tmp_path, config, policies={"other": tmp_path})
    monkeypatch.setattr(stages, "_make", lambda name, *_: made.append(name))
    made = list[str]()
    stages.rerun_stage(tmp_path, "report")
    assert made == ["report"]


def test_a_closed_terminal_ends_the_main_process_and_one_that_waits_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 5\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(launching, "_GRACE", 0.1)
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    earlier = [signal.signal(one, lambda *_: None) for one in signals]  # what is ignored is so in children too
    closing = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGHUP))
    begun = time.monotonic()
    try:
        closing.start()
        assert launching.launch([], 2) == -signal.SIGHUP
        assert time.monotonic() - begun < 4
    finally:
        closing.join()
        for one, handler in zip(signals, earlier, strict=True):
            signal.signal(one, handler)
