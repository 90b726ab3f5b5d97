"""What is one step of the speed benchmark, and how does a worker communicate with its parent?

This file uses only the standard library, because the worker of trl imports it in trl's own environment. A worker builds
its models and makes one warm-up step. Then it reads lines from stdin, JSON objects of the `Step` fields that differ
from the defaults; for each it makes one step and prints one row, a JSON object, to stdout.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

FIRST_WORD = 40  # Ids from here on are meaningless words of one token each; prompts consist of them.
STEPS = 10_000  # Of the simulated run; so many that the decaying learning rate stays at its initial value.


@dataclass(frozen=True)
class Step:
    """The shapes of one step of PPO. Lengths are in tokens; every prompt and response has the full length."""

    batch: int = 16
    minibatch: int = 4
    prompt: int = 256
    response: int = 64
    epochs: int = 1
    prompts: int = 1024  # In the data set from which a step draws its batch.

    def changed(self, line: str) -> Step:
        """Return the step that a line on stdin asks for."""
        return replace(self, **json.loads(line or "{}"))

    @property
    def tokens(self) -> int:
        """Number of sampled tokens."""
        return self.batch * self.response


TINY = Step(batch=4, minibatch=2, prompt=16, response=8, prompts=64)


@dataclass(frozen=True)
class Task:
    """The settings of a worker."""

    models: str  # Folder with `policy` and `reward`.
    dtype: str = "fp32"  # fp32 or bf16.
    generate: str = "batched"  # How trl samples: per-prompt or batched.
    step: Step = Step()
    threads: int = 2

    def arguments(self) -> list[str]:
        """Return the command-line arguments that `task` parses."""
        return [json.dumps(asdict(self))]


def task(arguments: Sequence[str]) -> Task:
    """Parse the command-line arguments of a worker."""
    settings = json.loads(arguments[0])
    return Task(**settings | {"step": Step(**settings["step"])})


def texts(vocabulary: dict[str, int], tokens: int, count: int) -> list[str]:
    """Return `count` prompts of `tokens` tokens, EOS included; at most 1,024 distinct ones, always the same."""
    words = sorted(vocabulary, key=vocabulary.__getitem__)[FIRST_WORD:]
    draw = random.Random(0)
    distinct = [" ".join(draw.choices(words, k=tokens - 1)) for _ in range(min(count, 1024))]
    return [distinct[i % len(distinct)] for i in range(count)]


def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries."""
    numbers = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "trl"):
        with suppress(PackageNotFoundError):
            numbers[name] = version(name)
    return numbers


def peak_gib() -> float:
    """Return the peak resident memory of this process in GiB (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 2**20


class Requests:
    """The steps that the parent asks for on stdin, the first of which is the warm-up, and their rows on stdout."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._requested = step
        self._answers = os.fdopen(os.dup(1), "w")  # the output of libraries goes to stderr, which the parent logs
        os.dup2(2, 1)
        self._lines = chain(["{}"], sys.stdin)
        self._number = -1
        self._before = 0.0

    def next(self) -> tuple[int, Step] | None:
        """Wait for a request and return its number and step; None once stdin is closed. The row's clock starts."""
        line = next(self._lines, None)
        if line is None:
            return None
        self._number += 1
        self._requested = self._step.changed(line)
        self._before = time.process_time()
        return self._number, self._requested

    def answer(self, row: dict[str, Any]) -> None:
        """Print the row of the last request, with processor time and peak memory; the parent drops the first one."""
        row["processor_seconds"] = time.process_time() - self._before
        row["peak_gib"] = peak_gib()
        row["step"] = asdict(self._requested)
        if self._number == 0:
            row["versions"] = versions()
        print(json.dumps(row), file=self._answers, flush=True)


def serve(step: Step, run: Callable[[int, Step], dict[str, Any]]) -> None:
    """Make a warm-up step, then answer lines on stdin until it is closed. `run` makes step `i` and returns its row."""
    requests = Requests(step)
    while (requested := requests.next()) is not None:
        requests.answer(run(*requested))
