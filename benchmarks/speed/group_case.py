"""What is one step of the benchmark of groups?

As step_case.py, this file uses only the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from step_case import Step, Task

# Every prompt and response has the full length; one update of all responses.
SMOLLM2 = Step(batch=16, minibatch=16, prompt=160, response=48, prompts=64)
TINY = Step(batch=16, minibatch=16, prompt=16, response=8, prompts=64)
KL_COEF = 0.05
LEARNING_RATE = 1e-5
LORA = {"r": 32, "alpha": 32, "targets": ("q_proj", "v_proj")}


@dataclass(frozen=True)
class GroupTask(Task):
    """The settings of a worker, whose `models` is the folder of a causal model."""

    step: Step = SMOLLM2
    algorithm: str = "grpo"
    group_size: int = 4
    microbatch: int = 4  # Responses per backward pass.


def group_task(arguments: Sequence[str]) -> GroupTask:
    """Parse the command-line arguments of a worker."""
    settings = json.loads(arguments[0])
    return GroupTask(**settings | {"step": Step(**settings["step"])})
