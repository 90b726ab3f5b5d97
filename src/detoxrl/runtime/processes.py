"""What do several processes of one run do together?

The main one leads: it runs a command as if it were alone, and tells the others when it wants help. What is told and
gathered goes over gloo, which notices at once when a process is gone; gradients go over what suits the device.
"""

import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from detoxrl.config.schema import Config
from detoxrl.errors import DetoxrlError, ProcessError, first_line, require

T = TypeVar("T")
Scores = Callable[[Sequence[str], Sequence[str]], torch.Tensor]
# Longest wait for the main process, which may prepare, warm-start and judge for hours.
_PATIENCE = timedelta(days=30)
# What accelerate may be asked for that shards weights.
_UNKNOWN = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


@dataclass
class _Here:
    rank: int = 0
    count: int = 1
    talk: Any = None
    words: Any = None  # where a helper that fails leaves word of why


_here = _Here()


class Relayed(Exception):
    """What was done together failed somewhere, and the main process raises it."""


def count() -> int:
    """Return how many processes work on the run; 1 until `join`."""
    return _here.count


def join() -> bool:
    """Meet the others that a launcher started, and return whether this is the main process.

    Raises InputError when accelerate is to shard weights in a way that is not known here, or there are too few GPUs,
    ProcessError when they do not meet.
    """
    _refuse_sharding()
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    number, most = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    rule = f"is above the number of GPUs of this machine, {most}"
    require(on_cpu or number <= most, "LOCAL_WORLD_SIZE", number, rule, "start fewer, or set ACCELERATE_USE_CPU=true")
    with _connected():
        state = PartialState(cpu=on_cpu)
        talk = dist.new_group(backend="gloo", timeout=_PATIENCE)
        words = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))  # type: ignore[attr-defined]
    _here.rank, _here.count, _here.talk, _here.words = state.process_index, state.num_processes, talk, words
    return _here.rank == 0


def _refuse_sharding() -> None:
    for kind in _UNKNOWN:
        asked = parse_flag_from_env(f"ACCELERATE_USE_{kind}")
        require(not asked, "accelerate", kind, "is not supported: every process holds the whole model", "leave it out")


def leave() -> None:
    """Part from the others, who notice: threads of the groups that are still there at exit may abort it."""
    _here.talk = None  # or its threads stay
    dist.destroy_process_group()


def blame(error: Exception) -> None:
    """Leave word of what ends this process; the main one raises it as it finds this one gone."""
    if not isinstance(error, ProcessError):
        what = f"process {_here.rank} of this run failed: {type(error).__name__}: {first_line(error)}"
        told = error if isinstance(error, DetoxrlError) else ProcessError(what)
        _here.words.set("failed", pickle.dumps((type(told), str(told))))


def require_led(config: Config, trains: bool) -> None:
    """Raise InputError where processes were started but not joined, or cannot do together what they are to do."""
    started, remedy = PartialState().num_processes, "say `torchrun -m detoxrl run`, with the reward in a file"
    require(started == _here.count, "processes", started, "share what the command line does, alone", remedy)
    size, rule = config.rl.batch_size, f"is below the number of processes, {started}"
    require(not trains or started <= size, "rl.batch_size", size, rule, "start fewer, or raise it")


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise  # memory that is full, for one
        if _here.rank == 0 and _here.words is not None and _here.words.check(["failed"]):
            kind, told = pickle.loads(_here.words.get("failed"))
            raise kind.__new__(kind, told) from error
        # gloo begins with a line of its source, and ends with advice.
        reason = re.sub(r"^\[[^\]]*\] ", "", first_line(error)).partition(". ")[0]
        raise ProcessError(f"a process of this run was lost: {reason}") from error


def tell(*task: Any) -> None:
    """Have the others do something, by what `told` returns there. The main process alone tells."""
    if _here.count > 1:
        same(task)


def told() -> tuple[Any, ...]:
    """Return what the main process tells next. Raises ProcessError when it is gone."""
    return same(())


def same(value: T) -> T:
    """Return the main process's value in every process."""
    found = [value]
    with _connected():
        dist.broadcast_object_list(found, src=0, group=_here.talk)
    return found[0]


def share(rows: Sequence[T]) -> list[T]:
    """Return every so manieth row, which is this process's part; with fewer rows than processes some have the same."""
    return list(rows[_here.rank :: _here.count] or rows[:1])


def everyone(value: T) -> list[T]:
    """Return the value that each process gives, by rank."""
    found = [value] * _here.count
    if _here.count > 1:
        with _connected():
            dist.all_gather_object(found, value, group=_here.talk)
    return found


def gather(make: Callable[[], T]) -> list[T]:
    """Return what `make` returns in each process, by rank.

    Where it raises a DetoxrlError in one of several, the main process raises that and the others Relayed.
    """
    found, fault = list[T](), None
    try:
        found.append(make())
    except DetoxrlError as error:
        fault = error
    each = everyone((found, (type(fault), str(fault)) if fault else None))
    if fault and _here.rank == 0:
        raise fault
    for kind, told in filter(None, (failed for _, failed in each)):
        raise kind.__new__(kind, told) if _here.rank == 0 else Relayed(told)
    return [value for some, _ in each for value in some]


def shared(reward: Scores) -> Scores:
    """Return a reward of which each process computes its part, and all get all."""

    def scores(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        found = torch.zeros(len(prompts))
        for rank, part in enumerate(gather(lambda: reward(share(prompts), share(responses)).cpu())):
            found[rank :: _here.count] = part[: len(found[rank :: _here.count])]
        return found

    return scores if _here.count > 1 else reward


def sum_gradients(weights: Sequence[torch.nn.Parameter]) -> None:
    """Replace the gradients of the weights by their sums over all processes; one without any counts as 0."""
    if _here.count == 1:
        return
    flat = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights])
    with _connected():
        dist.barrier(group=_here.talk)  # NCCL would wait for a process that has failed; gloo notices
        dist.all_reduce(flat)
    for weight, gradient in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.grad = gradient.view_as(weight)


def begin_alike(optimizer: Any) -> None:
    """Give every process the weights and moments that the main one begins with."""
    if _here.count == 1:
        return
    state, weights = optimizer.state_dict(), [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {i: {name: x.cpu() for name, x in one.items()} for i, one in state["state"].items()}
    values, moments = same(([weight.detach().cpu() for weight in weights], moments))
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
    optimizer.load_state_dict(state | {"state": moments})
