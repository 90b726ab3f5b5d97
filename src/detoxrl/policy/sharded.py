"""How do several processes hold one base together, each a part of it, and pass through it in step?

FSDP2 (Zhao et al. 2023, as torch's `fully_shard`) gathers a block's weights from all processes for as long as a pass
needs them, so they all have to pass, and equally often. Only the frozen base is in pieces: adapters and value head are
whole everywhere, so gradients, checkpoints and what is saved are as without.
"""

import gc
from itertools import chain
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from detoxrl import processes
from detoxrl.errors import require
from detoxrl.policy.plain import PlainNetwork
from detoxrl.policy.weights import POLICY, Weights
from detoxrl.records import Encoded


class ShardedNetwork(PlainNetwork):
    """A plain network whose passes are made by all processes together."""

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return what a plain one does, once all processes make such a pass."""
        with processes.turn("read to learn" if torch.is_grad_enabled() else "read"):
            return super().read(ids, mask)

    def predicted(self, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a plain one does, once all processes make such a pass."""
        with processes.turn("decode to learn" if torch.is_grad_enabled() else "decode"):
            return super().predicted(encoded, tokens, cache)


class StandIn:
    """Makes a pass for nothing where another process makes one of use: one token, and a gradient of 0."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._network, self._device = PlainNetwork(weights, POLICY), device
        self._states, self._end = list[torch.Tensor](), torch.zeros(0)

    def stand_in(self, kind: str) -> None:
        """Make a pass of a kind that `processes.turn` knows."""
        if kind == "back":
            self._end.backward(torch.zeros_like(self._end))
            return
        model, learns = self._network.weights.model, kind.endswith("to learn")
        token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        with torch.set_grad_enabled(learns):
            if kind.startswith("read"):
                self._states = [self._network.read(token, token + 1)]
                return
            states = token
            if self._network.has_encoder:
                width = self._network.weights.active.get_encoder().config.hidden_size
                states = torch.zeros(1, 1, width, dtype=model.dtype, device=self._device)
            if learns and self._states:  # the way back leads through the encoder too
                states = self._states.pop()
            self._end, _ = self._network.predicted(Encoded(states=states, mask=token + 1), token[:, :0], None)


def shard(weights: Weights, device: torch.device) -> None:
    """Move the models to the device, and of the base's blocks this process's part; those that are there stay.

    What is no block (embeddings, the head, adapters) is whole everywhere. Raises InputError for unknown blocks.
    """
    gc.collect()  # what was sharded before and is not needed any more: its blocks refer to themselves
    how = processes.sharding()
    assert how is not None
    names = set(how.transformer_cls_names_to_wrap or weights.active._no_split_modules or ())
    remedy = "name the class of its blocks, beside fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
    for model in dict.fromkeys(weights.models.values()):
        blocks = [one for one in model.modules() if names & {kind.__name__ for kind in type(one).__mro__}]
        rule = f"names no block of a {type(weights.active).__name__}"
        require(bool(blocks), "fsdp_transformer_cls_to_wrap", " ".join(names), rule, remedy)
        adapters = {w for name, w in model.named_parameters() if ".lora_" in name or ".modules_to_save." in name}
        whole = adapters | {weight for weight in model.parameters() if weight.requires_grad}
        new = [block for block in reversed(blocks) if not isinstance(block, FSDPModule)]  # inner ones first
        mesh = init_device_mesh(device.type, (processes.count(),)) if new else None
        for block in new:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
            # Gathers into memory of the stream that computes: a GPU's is used again in the stream it was made in alone.
            block._set_unshard_async_op(True)
        for tensor in chain(model.parameters(), model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(device)
