"""Which processes work on this run, and how do they do something together?

The main process runs a command as if it were alone. The other processes, the workers, serve it: they build the same
objects and make the same calls of methods that are marked `together`. A run of one process is a World of size 1, in
which everything below is the identity.

Objects travel over gloo, on GPUs too: it waits for days while the main process prepares, and it notices a lost process
at once. Gradients travel over the backend that suits the device.
"""

import os
import pickle
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from detoxrl.errors import DetoxrlError, ProcessError, first_line, require
from detoxrl.runtime.allocator import keep_freed_memory
from detoxrl.runtime.console import log

T = TypeVar("T")
P = ParamSpec("P")

# The longest wait for the main process, which may prepare, warm-start and judge for hours.
_PATIENCE = timedelta(days=30)
# Ways in which accelerate can be asked to shard a model.
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
# Seconds that a failed worker waits before it exits, so that the launcher sees the main process end first: the main
# process's exit code and message say why.
_WORKER_DELAY = 1.0


class Relayed(Exception):
    """A call failed in one of the processes. The main process raises the error itself; workers serve the next call."""


@dataclass(frozen=True)
class _Build:
    """The main process builds an object; every worker builds the same one and serves it from now on."""

    factory: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Call:
    """The main process calls a `together` method of the object that was built last."""

    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Set:
    """Every process makes a setting of its own."""

    make: Callable[[Any], None]
    value: Any


@dataclass(frozen=True)
class _End:
    """The main process's command has ended."""


class World:
    """The processes of this run: rank 0 is the main process, the others are workers."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, store: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._store = store  # Where a worker that fails leaves its error for the main process.

    @property
    def is_main(self) -> bool:
        """Whether this process leads the run."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this process, chosen by accelerate."""
        device: torch.device = PartialState().device
        return device

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's part of `items`: every `size`-th one, starting at `rank`.

        With fewer items than processes, the processes that would have none get the first item.
        """
        mine = list(items[self.rank :: self.size])
        return mine or list(items[:1])

    def broadcast(self, value: T) -> T:
        """Return the main process's value in every process."""
        if self.size == 1:
            return value

        values = [value]
        with self._connected():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank, in every process."""
        values = [value] * self.size
        if self.size > 1:
            with self._connected():
                dist.all_gather_object(values, value, group=self._group)
        return values

    def gather_results(self, compute: Callable[[], T]) -> list[T]:
        """Return what `compute` returns in every process, by rank.

        A DetoxrlError in any process is raised in the main process; the workers raise Relayed.
        """
        if self.size == 1:
            return [compute()]

        result = list[T]()
        error: DetoxrlError | None = None
        try:
            result.append(compute())
        except DetoxrlError as raised:
            error = raised

        failure = None if error is None else (type(error), str(error))
        outcomes = self.gather((result, failure))
        if error is not None and self.is_main:
            raise error

        for _, failed in outcomes:
            if failed is not None:
                kind, message = failed
                raise kind.__new__(kind, message) if self.is_main else Relayed(message)
        return [value for values, _ in outcomes for value in values]

    def sum_gradients(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Replace the gradients of the weights by their sums over all processes; a missing gradient counts as 0."""
        if self.size == 1:
            return

        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with self._connected():
            dist.barrier(group=self._group)  # NCCL would wait for a process that has failed; gloo notices.
            dist.all_reduce(flat)

        sizes = [weight.numel() for weight in weights]
        for weight, gradient in zip(weights, flat.split(sizes), strict=True):
            weight.grad = gradient.view_as(weight)

    def copy_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every process the weights and moments of the main process's optimizer."""
        if self.size == 1:
            return

        state = optimizer.state_dict()
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        moments = {
            number: {name: value.cpu() for name, value in moments_of_one.items()}
            for number, moments_of_one in state["state"].items()
        }
        values = [weight.detach().cpu() for weight in weights]
        values, moments = self.broadcast((values, moments))

        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
        optimizer.load_state_dict(state | {"state": moments})

    def set_everywhere(self, make: Callable[[T], None], value: T) -> None:
        """Call `make(value)`, a function of a module, in every process. The main process calls this."""
        self.broadcast(_Set(make, value))
        make(value)

    def build(self, factory: Callable[..., T], *arguments: Any) -> T:
        """Return `factory(*arguments)`, built in every process; the main process calls this.

        From then on `together` methods of the object run in every process.
        """
        self.broadcast(_Build(factory, arguments))
        return self.gather_built(lambda: factory(*arguments))

    def gather_built(self, build: Callable[[], T]) -> T:
        """Return what `build` returns here, once it has succeeded in every process. Raises as `gather_results`."""
        built = list[T]()
        self.gather_results(lambda: built.append(build()))
        return built[0]

    def announce(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Have the workers make a call of the object that was built last. Only the main process announces."""
        if self.size > 1 and self.is_main:
            self.broadcast(_Call(method, arguments))

    def end(self) -> None:
        """Tell the workers that the command has ended."""
        self.broadcast(_End())

    def serve(self) -> None:
        """Do what the main process announces until its command ends.

        Raises ProcessError when the main process is lost, and whatever else stops a call but Relayed.
        """
        built: Any = None
        while True:
            task: Any = self.broadcast(None)
            try:
                match task:
                    case _Build():
                        built = None  # What was built before is freed first.
                        built = self.gather_built(lambda task=task: task.factory(*task.arguments))  # type: ignore[misc]
                    case _Call():
                        getattr(built, task.method)(*task.arguments)
                    case _Set():
                        task.make(task.value)
                    case _End():
                        return
            except Relayed:
                continue

    def report_failure(self, error: Exception) -> None:
        """Leave the error that ends this worker where the main process finds it once it misses the worker."""
        if isinstance(error, ProcessError):
            return

        described = error
        if not isinstance(error, DetoxrlError):
            described = ProcessError(f"worker {self.rank} failed: {type(error).__name__}: {first_line(error)}")
        self._store.set("failed", pickle.dumps((type(described), str(described))))

    def leave(self) -> None:
        """Leave the process group. Threads of a group that still exists at exit may abort the process."""
        self._group = None
        dist.destroy_process_group()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Turn a lost process into a ProcessError, or into the error that the lost worker left."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise  # Not about the connection: out of memory, for example.

            if self.is_main and self._store is not None and self._store.check(["failed"]):
                kind, message = pickle.loads(self._store.get("failed"))
                raise kind.__new__(kind, message) from error

            # gloo's message begins with a line of its source code, and ends with advice.
            reason = re.sub(r"^\[[^\]]*\] ", "", first_line(error)).partition(". ")[0]
            raise ProcessError(f"a process of this run was lost: {reason}") from error


_world = World()


def current_world() -> World:
    """Return the World of this process: of size 1 until `run_in_world` has joined the others."""
    return _world


class _Shared(Protocol):
    """An object that exists in every process of a World."""

    world: World


Owner = TypeVar("Owner", bound=_Shared)


def together(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """Make a call of the method run in every process: the main process's call announces itself to the workers.

    The object has to be made by `World.build`, and the arguments are pickled. A `together` method must not call another
    one: the workers, which run its body too, would hear of that call twice.
    """

    @wraps(method)
    def announced(self: Owner, *arguments: P.args, **named: P.kwargs) -> T:
        assert not named, "only positional arguments travel"
        self.world.announce(method.__name__, arguments)
        return method(self, *arguments, **named)

    return announced  # type: ignore[return-value]


def run_in_world(command: Callable[[], None]) -> None:
    """Run a command in the main one of the processes that a launcher started, while the others serve it.

    Raises what the command raises, InputError when the processes cannot work here, and in a worker ProcessError when
    the main process is lost.
    """
    global _world
    _world = _join()
    if _world.is_main:
        try:
            command()
            _world.end()
        finally:
            _world.leave()
        return

    log.quiet = True
    # The main process hears these signals too, and needs the workers to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep_freed_memory()
    try:
        _world.serve()
    except Exception as error:
        _world.report_failure(error)
        _world.leave()
        time.sleep(_WORKER_DELAY)
        raise
    _world.leave()


def _join() -> World:
    """Meet the other processes. Raises InputError for what detoxrl cannot do, ProcessError when they do not meet."""
    for kind in _SHARDING:
        asked = parse_flag_from_env(f"ACCELERATE_USE_{kind}")
        rule = "is not supported, because every process holds the whole model"
        require(
            not asked, "accelerate", kind, rule, "start the processes without it; policy.bf16 halves a base's memory"
        )

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.accelerator.device_count()
    rule = f"exceeds the number of GPUs of this machine, {gpus}"
    require(on_cpu or here <= gpus, "LOCAL_WORLD_SIZE", here, rule, "start fewer, or set ACCELERATE_USE_CPU=true")

    with World()._connected():
        state = PartialState(cpu=on_cpu)
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))  # type: ignore[attr-defined]
    return World(state.process_index, state.num_processes, group, store)
