"""How much of a step fits into memory, and what becomes of what is freed?"""

import ctypes
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any, Self

import psutil
import torch

from detoxrl.config.schema import Config
from detoxrl.models.policy import Policy
from detoxrl.models.types import Prompt
from detoxrl.runtime import processes
from detoxrl.runtime.console import log
from detoxrl.runtime.run_folder import RunFolder

# Of the free memory a rollout's keys and values may take as much, and an update's activations twice that.
_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What is chosen once of a run's use of memory, as it changes the last digits of its numbers, and nothing else."""

    microbatch_size: int  # Responses per pass of an update.
    keep_cross: bool  # Whether the update shares what cross-attention makes of the prompts, or makes it again.

    @classmethod
    def of(cls, folder: RunFolder, policy: Policy, prompts: list[Prompt], config: Config) -> Self:
        """Return what the run goes by, or chooses now from what is free, and keep it in memory.json."""
        asked = config.rl.microbatch_size
        if (folder / "memory.json").is_file():
            kept = {"processes": 1} | folder.read_json("memory.json")
            if {name: kept.pop(name) for name in _question(asked)} == _question(asked):
                return cls(**kept)
        most = config.rl.minibatch_size
        cross, activations = _bytes_per_response(policy, max(prompts, key=lambda prompt: len(prompt.text)), config)
        free = _SHARE * free_bytes(policy.device)
        room = cls(
            microbatch_size=min(asked or max(1, int(2 * free / activations)), most),
            keep_cross=cross * -(-config.rl.batch_size // processes.count()) < free,  # each keeps its share's
        )
        if asked is None and room.microbatch_size < most:
            log.print(f"train: an update reads {room.microbatch_size} of {most} responses at once, as memory allows")
        room.keep(folder, asked)
        return room

    def keep(self, folder: RunFolder, asked: int | None) -> None:
        """Write it to the run folder, with what it answers."""
        folder.write_json("memory.json", _question(asked) | asdict(self))


def _question(asked: int | None) -> dict[str, Any]:
    """Return what a choice answers, for which it holds."""
    return {"asked": asked, "processes": processes.count()}


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for what comes next, and return whether it will.

    glibc gives blocks above 32 MB back at once and takes them anew, page by page: some 5 % of a step's processor time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim, mmap, most = -1, -3, 2**31 - 1  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    return all(ctypes.CDLL(None).mallopt(which, most) == 1 for which in (trim, mmap))


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that nobody uses, on a CPU this process's part of them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _bytes_per_response(policy: Policy, longest: Prompt, config: Config) -> tuple[int, int]:
    """Return the bytes of a response's keys and values, and of what its update keeps for the way back."""
    with torch.no_grad():
        encoded = policy.shared(policy.encode([longest.text]))
    shared = [] if encoded.cross is None else [encoded.cross]
    known = {tensor.untyped_storage()._cdata for tensor in (*policy.model.parameters(), *shared)}
    seen: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage())._cdata not in known:
            seen[storage._cdata] = storage
        return tensor

    def unused(tensor: Any) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, unused):
        read = policy.encode([longest.text]) if policy.train_encoder else encoded
        ids = torch.zeros(1, config.generation.max_new_tokens, dtype=torch.long, device=policy.device)
        kept = policy.logprobs(read, ids, config.generation.temperature)
    # Counted at the end, when a block that was gathered from all processes takes no room any more.
    activations = sum(storage.nbytes() for storage in seen.values())
    del kept
    return sum(tensor.nbytes for tensor in shared), max(1, activations)
