"""What does each other process do while the main one leads a command?"""

import signal
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from detoxrl.commands.measure import sampled
from detoxrl.config.schema import Config
from detoxrl.data.rows import to_prompts
from detoxrl.models.lora import load_policy
from detoxrl.rewards.shaping import Normaliser
from detoxrl.runs import base_and_start, rows_of, run_scorer
from detoxrl.runtime import processes
from detoxrl.runtime.console import log
from detoxrl.runtime.randomness import batch_indices
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training.memory import MemoryPlan, keep_freed_memory
from detoxrl.training.metrics import Watch
from detoxrl.training.train import learner, ppo_step, reference_normaliser
from detoxrl.training.validation import Validator

Tasks = dict[str, Callable[..., object]]
_ALWAYS: Tasks = {"measure": lambda *given: deque(sampled(*given), maxlen=0), "threads": torch.set_num_threads}


def led(command: Callable[[], None]) -> None:
    """Do a command in the main of several processes, and in the others what it wants done, until it ends.

    Raises what `processes.join` and the command raise; in the others ProcessError when the main one is gone.
    """
    if processes.join():
        try:
            command()
            processes.tell("end")
        finally:
            processes.leave()
        return
    log.quiet = True
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process hears them too, and needs us to end its step
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    try:
        _help()
    except Exception as error:
        processes.blame(error)
        processes.leave()
        time.sleep(1)  # whoever watches sees the main process end first, whose code and words say why
        raise
    processes.leave()


def _help() -> None:
    tasks = _ALWAYS
    while (task := processes.told())[0] != "end":
        what, *given = task
        try:
            if what in ("train", "measure"):
                tasks = _ALWAYS  # what was trained before is let go
            if what == "train":
                tasks = _ALWAYS | _training(*given)
            else:
                tasks[what](*given)
        except processes.Relayed:  # the main process has the error itself, and may go on to something else
            continue


def _training(folder: RunFolder, config: Config) -> Tasks:
    """Return what `train` tells, for a policy that is trained as the main process's is."""
    loaded = list[Any]()

    def load() -> None:
        loaded.append(load_policy(*base_and_start(folder, config), config.policy, config.seed))
        loaded.append(processes.shared(run_scorer(folder, config, None).reward))
        loaded.extend(rows_of(folder, split) for split in ("train", "validation"))

    processes.gather(load)
    policy, reward, rows, validation_rows = loaded
    accelerator, optimizer = learner(policy, config.rl)
    prompts, size = to_prompts(rows), config.rl.batch_size

    def step(normaliser: Normaliser, number: int, kl_coef: float, room: MemoryPlan) -> None:
        batch = [prompts[i] for i in batch_indices(config.seed, "prompts", number, size, len(prompts))]
        ppo_step(policy, accelerator, optimizer, reward, normaliser, batch, config, number, kl_coef, Watch(), room)

    return {
        "begin": partial(processes.begin_alike, optimizer),
        "normalise": partial(reference_normaliser, policy, reward, prompts, config),
        "validate": partial(Validator(policy, config, validation_rows), reward, lambda texts: np.zeros(len(texts))),
        "step": step,
    }
