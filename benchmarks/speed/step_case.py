"""What is one step of the speed benchmark, and how does a worker talk to its parent? Standard library only.

trl runs in an environment of its own, so what both sides need stands here (benchmarks/step_speed.py says the question).
A worker builds its models, makes a step to warm up, then answers each line on stdin, a JSON object of `Step` fields
that differ from the usual ones, by making one step and printing a row on stdout, a JSON object.
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

FREE = 40
"""Ids from here on are words that mean nothing, one token each; prompts are made of them."""
STEPS = 10_000
"""Steps of the imagined run, so that a decaying learning rate stays where it began."""


@dataclass(frozen=True)
class Step:
    """Shapes of one step of PPO; lengths in tokens, and every prompt and response has its full length."""

    batch: int = 16
    minibatch: int = 4
    prompt: int = 256
    response: int = 64
    epochs: int = 1
    prompts: int = 1024
    """Prompts in the data set, from which a step draws its batch."""

    def changed(self, line: str) -> Step:
        """Return the step that a line on stdin asks for."""
        return replace(self, **json.loads(line or "{}"))

    @property
    def tokens(self) -> int:
        """Tokens that are sampled."""
        return self.batch * self.response


TINY = Step(batch=4, minibatch=2, prompt=16, response=8, prompts=64)


@dataclass(frozen=True)
class Task:
    """What a worker is started with."""

    models: str
    """Folder with `policy` and `reward`."""
    dtype: str = "fp32"
    """fp32 or bf16."""
    generate: str = "batched"
    """How trl samples: per-prompt or batched."""
    step: Step = Step()
    threads: int = 2

    def words(self) -> list[str]:
        """Return the argument from which `task` makes the same again."""
        return [json.dumps(asdict(self))]


def task(words: Sequence[str]) -> Task:
    """Return the task in a worker's arguments."""
    settings = json.loads(words[0])
    return Task(**settings | {"step": Step(**settings["step"])})


def texts(vocabulary: dict[str, int], tokens: int, count: int) -> list[str]:
    """Return prompts of so many tokens, the end of the text among them; 1,024 distinct ones, the same everywhere."""
    words = sorted(vocabulary, key=vocabulary.__getitem__)[FREE:]
    draw = random.Random(0)
    made = [" ".join(draw.choices(words, k=tokens - 1)) for _ in range(min(count, 1024))]
    return [made[i % len(made)] for i in range(count)]


def versions() -> dict[str, str]:
    """Return the versions of what computes here."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "trl"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def peak_gib() -> float:
    """Return the most memory the process ever had resident, as the kernel counts it (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 2**20


def serve(step: Step, run: Callable[[int, Step], dict[str, Any]]) -> None:
    """Warm up, then answer lines on stdin until it is closed; `run` makes step `i` and returns its row."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr, where the parent keeps it
    os.dup2(2, 1)
    for i, line in enumerate(chain(["{}"], sys.stdin)):  # the first is to warm up; the parent drops its row
        asked = step.changed(line)
        before = time.process_time()
        row = run(i, asked)
        row |= {"processor_seconds": time.process_time() - before, "peak_gib": peak_gib(), "step": asdict(asked)}
        print(json.dumps(row if i else row | {"versions": versions()}), file=answers, flush=True)
