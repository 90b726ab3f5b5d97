"""Several processes of one World, forked from the test's own process, which join as a launcher's processes do."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

from detoxrl.runtime.world import run_in_world

_SECONDS = 60


def forked_world(command: Callable[[], object], size: int = 2) -> list[str]:
    """Run a command in the main one of `size` processes; return how each ended.

    That is what the main process's command returned, "done" for a worker, or an error and the function that raised it.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]

    def work(rank: int) -> None:
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "OMP_NUM_THREADS": 1,
        }
        os.environ.update({name: str(value) for name, value in environment.items()})
        torch.set_num_threads(1)  # Threads of the parent's pool do not exist here.
        PartialState._reset_state()
        _, writer = pipes[rank]
        writer.send(_outcome(command))

    workers = [context.Process(target=work, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    try:
        for (reader, _), worker in zip(pipes, workers, strict=True):
            wait([reader, worker.sentinel], _SECONDS)
        return [reader.recv() if reader.poll() else f"nothing in {_SECONDS} seconds" for reader, _ in pipes]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _outcome(command: Callable[[], object]) -> str:
    returned: list[object] = []
    try:
        run_in_world(lambda: returned.append(command()))
        outcome = str(*returned) if returned else "done"
    except Exception as error:
        function = traceback.extract_tb(error.__traceback__)[-1].name
        outcome = f"{type(error).__name__} in {function}: {error}"

    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    is_in_group = dist.is_initialized() or "pt_gloo_runloop" in threads
    return f"{outcome}, still in a group" if is_in_group else outcome
