"""What processes do together, in forked ones; tests/commands/test_processes.py starts real ones."""

from __future__ import annotations

import gc
import pickle
import time
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from detoxrl.errors import InputError, ProcessError
from detoxrl.runtime import world as world_module
from detoxrl.runtime.world import Relayed, World, current_world, together
from forked_world import forked_world


def refuse() -> NoReturn:
    raise InputError("policy.adapter", "there", "is no folder here", "copy it")


class Counter:
    """An object that every process builds."""

    def __init__(self, start: int) -> None:
        self.world = current_world()
        self.start = start

    @together
    def ranks(self, factor: int) -> list[int]:
        return self.world.gather(self.start + factor * self.world.rank)

    @together
    def fail_in_worker(self, failure: Callable[[], None]) -> list[None]:
        if not self.world.is_main:
            failure()
        return self.world.gather(None)

    @together
    def refuse_in(self, rank: int) -> list[None]:
        return self.world.gather_results(lambda: refuse() if self.world.rank == rank else None)

    @together
    def sum_in_worker_that_fails(self) -> None:
        if not self.world.is_main:
            raise ValueError("sizes do not match")
        self.world.sum_gradients([torch.nn.Parameter(torch.zeros(2))])

    @together
    def sum_gradients(self, has_gradient: list[bool]) -> list[float]:
        weight = torch.nn.Parameter(torch.zeros(2))
        if has_gradient[self.world.rank]:
            weight.grad = torch.tensor([1.0, 10.0]) * (self.world.rank + 1)
        self.world.sum_gradients([weight])
        assert weight.grad is not None
        return weight.grad.tolist()


class OnlyInMain:
    """An object that no worker can build."""

    def __init__(self) -> None:
        self.world = current_world()
        if not self.world.is_main:
            refuse()


def test_a_world_of_one_does_everything_alone() -> None:
    world = World()
    assert (world.is_main, world.share([1, 2, 3]), world.gather("a"), world.broadcast("b")) == (
        True,
        [1, 2, 3],
        ["a"],
        "b",
    )
    assert world.gather_results(lambda: 5) == [5]
    assert world.build(Counter, 3).ranks(7) == [3]
    weight = torch.nn.Parameter(torch.zeros(2))
    world.sum_gradients([weight])
    assert weight.grad is None


@given(st.lists(st.integers(), min_size=1, max_size=20), st.integers(1, 8))
def test_shares_cover_all_items_evenly(items: list[int], size: int) -> None:
    shares = [World(rank, size).share(items) for rank in range(size)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if len(items) >= size:
        assert sorted(item for share in shares for item in share) == sorted(items)
    else:
        assert shares[len(items) :] == [items[:1]] * (size - len(items))


def test_every_process_builds_the_object_and_makes_its_calls() -> None:
    def command() -> list[Any]:
        counter = current_world().build(Counter, 100)
        return [counter.ranks(1), counter.ranks(10)]

    assert forked_world(command, 3) == ["[[100, 101, 102], [100, 110, 120]]", "done", "done"]


def test_gradients_are_summed_and_a_missing_one_counts_as_zero() -> None:
    def command() -> list[float]:
        return current_world().build(Counter, 0).sum_gradients([True, False, True])

    assert forked_world(command, 3)[0] == "[4.0, 40.0]"


def test_an_object_that_a_worker_cannot_build_is_the_main_processes_error() -> None:
    main, worker = forked_world(lambda: current_world().build(OnlyInMain))
    assert main == "InputError in gather_results: policy.adapter = 'there': is no folder here; copy it"
    assert worker.startswith("ProcessError in _connected: a process of this run was lost: ")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_is_raised_in_the_main_one_and_workers_serve_on(rank: int) -> None:
    def command() -> list[int]:
        counter = current_world().build(Counter, 5)
        with pytest.raises(InputError, match="is no folder here"):
            counter.refuse_in(rank)
        return counter.ranks(1)

    assert forked_world(command) == ["[5, 6]", "done"]


def test_an_unexpected_input_error_of_a_worker_is_the_main_processes_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(seconds: float) -> None:
        assert not dist.is_initialized(), "the main process would notice too late"

    monkeypatch.setattr(time, "sleep", wait)
    main, worker = forked_world(lambda: current_world().build(Counter, 0).fail_in_worker(refuse))
    assert main == "InputError in _connected: policy.adapter = 'there': is no folder here; copy it"
    assert worker.startswith("InputError in refuse: ")


def test_what_fails_before_gradients_are_summed_is_noticed_before_the_backend_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wait(_: torch.Tensor) -> NoReturn:
        raise AssertionError("NCCL would wait here")

    monkeypatch.setattr(dist, "all_reduce", wait)
    main, worker = forked_world(lambda: current_world().build(Counter, 0).sum_in_worker_that_fails())
    assert main == "ProcessError in _connected: worker 1 failed: ValueError: sizes do not match"
    assert worker == "ValueError in sum_in_worker_that_fails: sizes do not match"


def test_the_main_processes_own_error_ends_the_workers_and_stays_itself() -> None:
    main, *workers = forked_world(refuse, 3)
    assert main == "InputError in refuse: policy.adapter = 'there': is no folder here; copy it"
    for worker in workers:
        assert worker.startswith("ProcessError in _connected: a process of this run was lost: ")


def test_workers_keep_freed_memory_and_take_the_runs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(world_module, "keep_freed_memory", lambda: kept.append(current_world().rank))
    monkeypatch.setattr(Counter, "ranks", together(_threads_and_kept(kept)))

    def command() -> object:
        world = current_world()
        world.set_everywhere(torch.set_num_threads, 3)
        return world.build(Counter, 0).ranks(0)

    assert forked_world(command) == ["[(3, []), (3, [1])]", "done"]


def _threads_and_kept(kept: list[int]) -> Callable[[Counter, int], Any]:
    def ranks(self: Counter, factor: int) -> list[tuple[int, list[int]]]:
        return self.world.gather((torch.get_num_threads(), kept))

    return ranks


def test_a_worker_frees_what_it_built_before_it_builds_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weights:
        pass

    built: list[weakref.ref[Weights]] = []
    alive: list[int] = []

    class Built:
        def __init__(self) -> None:
            gc.collect()
            alive.append(sum(reference() is not None for reference in built))
            self.weights = Weights()
            built.append(weakref.ref(self.weights))

    tasks = iter([world_module._Build(Built, ()), world_module._Build(Built, ()), world_module._End()])
    worker = World()
    monkeypatch.setattr(worker, "broadcast", lambda _: next(tasks))
    worker.serve()
    assert alive == [0, 0]


def test_a_relayed_error_does_not_end_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def relay() -> NoReturn:
        raise Relayed("the main process has it")

    tasks = iter([world_module._Build(relay, ()), world_module._End()])
    worker = World()
    monkeypatch.setattr(worker, "broadcast", lambda _: next(tasks))
    worker.serve()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_sharding_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(InputError, match=f"accelerate = '{kind}': is not supported, because every process holds"):
        world_module._join()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)

    def meet(cpu: bool) -> NoReturn:
        raise ProcessError(f"on CPUs: {cpu}")

    monkeypatch.setattr(world_module, "PartialState", meet)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    rule = "LOCAL_WORLD_SIZE = 3: exceeds the number of GPUs of this machine, 2; start fewer"
    with pytest.raises(InputError, match=rule):
        world_module._join()

    for name, value, on_cpu in (("LOCAL_WORLD_SIZE", "2", False), ("ACCELERATE_USE_CPU", "true", True)):
        monkeypatch.setenv(name, value)
        with pytest.raises(ProcessError, match=f"on CPUs: {on_cpu}"):
            world_module._join()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")


def test_errors_survive_the_way_between_processes() -> None:
    error = InputError("rl.lr", 0, "must be above 0", "give a larger value")
    kind, message = pickle.loads(pickle.dumps((type(error), str(error))))
    assert str(kind.__new__(kind, message)) == str(error)
