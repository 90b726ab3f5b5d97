"""How do several responses share what a causal model has read of their prompt, with exact gradients?

Every layer of a causal model turns the prompt into keys and values, which the tokens of a response attend to. They are
the same for all responses to a prompt, so a first pass computes them once and a second pass reads the responses behind
them. Gradients of all responses sum up in the keys and values, and flow on through the prompt.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class _ReadLayer(DynamicLayer):
    """Holds the keys and values of one pass over the prompts."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hold the keys and values (B, H, P, d) and return them.

        They are not appended: with gradient checkpointing the backward pass computes them a second time.
        """
        self.lazy_initialization(key_states, value_states)
        self.keys = key_states
        self.values = value_states
        return key_states, value_states


class _KeptLayer(DynamicLayer):
    """Holds the keys and values of the prompts, and never those of responses, so that it can be read again."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys = keys
        self.values = values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the keys and values (B, H, P + T, d) of prompts and responses."""
        keys: Any = self.keys
        values: Any = self.values
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def new_prefix() -> Cache:
    """Return a cache for one pass over prompts."""
    return Cache(layer_class_to_replicate=_ReadLayer)


def kept_prefix(prefix: Cache, group_size: int) -> Cache:
    """Return a cache for a pass over the responses, `group_size` to each prompt that the pass with `prefix` read."""
    layers: list[Any] = []
    read_layers: list[Any] = prefix.layers
    for layer in read_layers:
        keys = layer.keys.repeat_interleave(group_size, 0)
        values = layer.values.repeat_interleave(group_size, 0)
        layers.append(_KeptLayer(keys, values))
    return Cache(layers=layers)


def release(prefix: Cache) -> None:
    """Let go of the keys and values of a pass over prompts.

    With gradient checkpointing their graph holds the arguments of every layer until a backward pass, this cache among
    them: a circle that Python cannot collect. A backward pass puts keys and values back in place by itself.
    """
    for layer in prefix.layers:
        layer.keys = None  # type: ignore[union-attr]
        layer.values = None  # type: ignore[union-attr]
