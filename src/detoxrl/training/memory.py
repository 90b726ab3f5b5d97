"""How much of a training step fits into memory?"""

import os
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple, Self

import psutil
import torch

from detoxrl.config.schema import Config
from detoxrl.models.policy import Policy
from detoxrl.models.recompute import layers_to_recompute
from detoxrl.models.types import Encoded, Prompt
from detoxrl.runtime.console import log
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.runtime.world import World

_FILE = "memory.json"
# The share of free memory that a rollout's keys and values may take. An update's activations may take twice that.
_SHARE = 0.25
_RECOMPUTES = "computes activations again in its backward pass"


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run chooses once by its free memory. The choice changes the last digits of its numbers, nothing else."""

    microbatch_size: int  # Responses per pass of an update.
    keep_cross: bool  # Whether an update shares the keys and values of cross-attention, or computes them again.
    recompute: bool = False  # Whether a backward pass computes activations again, although nobody asked for that.

    @classmethod
    def choose(cls, policy: Policy, prompts: list[Prompt], config: Config, world: World) -> Self:
        """Return the plan that fits what is free now."""
        most = config.rl.minibatch_size
        group_size = config.rl.responses_per_prompt
        asked = config.rl.microbatch_size
        longest = max(prompts, key=lambda prompt: len(prompt.text))
        needed = _update_bytes(policy, longest, config)

        free = _SHARE * free_bytes(policy.device)
        recompute = not needed.has_room(2 * free) and _could_recompute(policy)
        if recompute:
            with policy.recomputing(True):
                needed = _update_bytes(policy, longest, config)
            log.print(f"train: an update {_RECOMPUTES}, to fit into memory")

        fitting = needed.fitting(2 * free, group_size)
        prompts_here = -(-config.rl.prompts_per_step // world.size)  # Each process keeps those of its own part.
        keep_cross = needed.cross * prompts_here < free
        plan = cls(microbatch_size=min(asked or fitting, most), keep_cross=keep_cross, recompute=recompute)
        if asked is None and plan.microbatch_size < most:
            log.print(f"train: an update reads {plan.microbatch_size} of {most} responses at once, to fit into memory")
        return plan

    @classmethod
    def stored(cls, folder: RunFolder, config: Config, world: World) -> Self | None:
        """Return the plan in memory.json if it was made for this setting and number of processes, else None."""
        if not (folder / _FILE).is_file():
            return None

        stored = {
            "processes": 1,
            "checkpointing": False,
            "group_size": 1,
            "entropy_bonus": False,
            "recompute": False,
            **folder.read_json(_FILE),
        }
        conditions = _conditions(config, world)
        if any(stored[name] != value for name, value in conditions.items()):
            return None
        return cls(**{field.name: stored[field.name] for field in fields(cls)})

    def save(self, folder: RunFolder, config: Config, world: World) -> None:
        """Write memory.json: the plan, and the conditions under which it holds."""
        folder.write_json(_FILE, _conditions(config, world) | asdict(self))

    def reduced(self, policy: Policy) -> Self | None:
        """Return a plan that takes less memory: microbatches of half the size, at last with activations recomputed.

        None if nothing is left to save.
        """
        if self.microbatch_size > 1:
            return replace(self, microbatch_size=-(-self.microbatch_size // 2))
        if not self.recompute and _could_recompute(policy):
            return replace(self, recompute=True)
        return None

    def together_with(self, others: Sequence[Self]) -> Self:
        """Return the plan that takes no more memory than any of several processes' does."""
        smallest = min(plan.microbatch_size for plan in others)
        return replace(self, microbatch_size=smallest, recompute=any(plan.recompute for plan in others))

    def __str__(self) -> str:
        also = f" and {_RECOMPUTES}" if self.recompute else ""
        return f"reads {self.microbatch_size} responses at once{also}"


def _conditions(config: Config, world: World) -> dict[str, Any]:
    return {
        "asked": config.rl.microbatch_size,
        "processes": world.size,
        "checkpointing": config.policy.checkpointing,
        "group_size": config.rl.responses_per_prompt,
        "entropy_bonus": config.rl.entropy_coef > 0,
    }


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of memory; on a CPU this process's part of them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class UpdateBytes(NamedTuple):
    """What an update holds at most, in bytes."""

    cross: int  # Shared keys and values of cross-attention, of each prompt.
    prompt: int  # Activations of a prompt, which the responses of its group share.
    response: int  # Activations of a response; without groups, those of its prompt too.

    def has_room(self, budget: float) -> bool:
        """Return whether a response and its prompt fit."""
        return self.prompt + self.response <= budget

    def fitting(self, budget: float, group_size: int) -> int:
        """Return how many responses a microbatch may have: whole groups, or a part of one."""
        groups = int(budget / (self.prompt + group_size * self.response))
        if groups > 0:
            return groups * group_size
        return max(1, int((budget - self.prompt) / self.response))


def _update_bytes(policy: Policy, longest: Prompt, config: Config) -> UpdateBytes:
    """Measure what an update of responses to the longest prompt holds."""
    with torch.no_grad():
        encoded = policy.with_shared_cross(policy.encode([longest.text]))
    cross = 0 if encoded.cross is None else encoded.cross.nbytes

    group_size = config.rl.responses_per_prompt
    of_one = _held_bytes(policy, longest, encoded, config, 1)
    if group_size == 1:
        return UpdateBytes(cross, prompt=0, response=max(1, of_one))

    of_group = _held_bytes(policy, longest, encoded, config, group_size)
    response = max(1, (of_group - of_one) // (group_size - 1))
    return UpdateBytes(cross, prompt=max(0, of_one - response), response=response)


def _held_bytes(policy: Policy, longest: Prompt, encoded: Encoded, config: Config, responses: int) -> int:
    """Return the bytes of the activations that an update of some responses to one prompt holds at most."""
    held = _saved_bytes(policy, longest, encoded, config, responses)
    if policy.checkpointing:
        # The backward pass adds the activations of one layer at a time to the inputs of all layers.
        with policy.recomputing(False):
            whole = _saved_bytes(policy, longest, encoded, config, responses)
        held += (whole - held) // _decoder_layers(policy)
    return held


def _saved_bytes(policy: Policy, longest: Prompt, encoded: Encoded, config: Config, responses: int) -> int:
    """Return the bytes that a pass of responses to one prompt saves for the backward pass. Nothing is kept here."""
    shared = [] if encoded.cross is None else [encoded.cross]
    counted = {tensor.untyped_storage()._cdata for tensor in (*policy.model.parameters(), *shared)}
    saved = 0

    def count(tensor: torch.Tensor) -> None:
        nonlocal saved
        storage = tensor.untyped_storage()
        if storage._cdata not in counted:
            saved += storage.nbytes()
            counted.add(storage._cdata)
            weakref.finalize(storage, counted.discard, storage._cdata)  # Its address may soon be that of another.

    def never_read(_: None) -> torch.Tensor:
        raise AssertionError("there is no backward pass")

    with torch.autograd.graph.saved_tensors_hooks(count, never_read):
        if policy.train_encoder:
            encoded = policy.encode([longest.text])
        ids = torch.zeros(responses, config.generation.max_new_tokens, dtype=torch.long, device=policy.device)
        with_entropy = config.rl.entropy_coef > 0
        policy.logprobs(encoded, ids, config.generation.temperature, entropy_gradient=with_entropy)
    return saved


def _could_recompute(policy: Policy) -> bool:
    """Return whether activations could be recomputed that are kept now."""
    return not policy.checkpointing and len(layers_to_recompute(policy.model)) > 0


def _decoder_layers(policy: Policy) -> int:
    model: Any = policy.weights.active
    return len(layers_to_recompute(model.get_decoder() if policy.has_encoder else model))
