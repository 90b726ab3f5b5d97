"""How do several responses share what a causal model has read of their prompt, with exact gradients?

Every layer of a causal model turns the prompt into keys and values, which the tokens of a response attend to. They are
the same for all responses to a prompt, so a first pass computes them once and a second pass reads the responses behind
them. Gradients of all responses sum up in the keys and values, and flow on through the prompt.
"""

from collections.abc import Iterator
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


class _RoomyLayer(DynamicLayer):
    """Holds the keys and values of prompts and of a response that grows token by token, in memory for all its tokens.

    Appending a token then writes this token alone. `DynamicLayer` copies all tokens before it.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._key_room = _with_room(keys, tokens)
        self._value_room = _with_room(values, tokens)
        self._show(keys.shape[-2])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append keys and values (B, H, n, d) and return those of all tokens. There must be room for them."""
        seen = self.get_seq_length()
        length = seen + key_states.shape[-2]
        self._key_room[:, :, seen:length] = key_states
        self._value_room[:, :, seen:length] = value_states
        self._show(length)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Drop all rows but these."""
        self._key_room = self._key_room[indices]
        self._value_room = self._value_room[indices]
        self._show(self.get_seq_length())

    def _show(self, length: int) -> None:
        self.keys = self._key_room[:, :, :length]
        self.values = self._value_room[:, :, :length]


def _with_room(states: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return states (B, H, P, d) in the memory of (B, H, P + tokens, d)."""
    batch, heads, length, size = states.shape
    room = states.new_empty(batch, heads, length + tokens, size)
    room[:, :, :length] = states
    return room


def new_prefix() -> Cache:
    """Return a cache for one pass over prompts."""
    return Cache(layer_class_to_replicate=_ReadLayer)


def kept_prefix(prefix: Cache, group_size: int) -> Cache:
    """Return a cache for a pass over the responses, `group_size` to each prompt that the pass with `prefix` read."""
    layers: list[Any] = [_KeptLayer(keys, values) for keys, values in _repeated(prefix, group_size)]
    return Cache(layers=layers)


def growing_prefix(prefix: Cache, group_size: int, tokens: int) -> Cache:
    """Return a cache for up to this many tokens of the responses, `group_size` to each prompt read with `prefix`."""
    layers: list[Any] = [_RoomyLayer(keys, values, tokens) for keys, values in _repeated(prefix, group_size)]
    return Cache(layers=layers)


def _repeated(prefix: Cache, group_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the keys and values (B, H, P, d) of each layer, each prompt's for every response to it."""
    layers: list[Any] = prefix.layers
    for layer in layers:
        yield layer.keys.repeat_interleave(group_size, 0), layer.values.repeat_interleave(group_size, 0)


def release(prefix: Cache) -> None:
    """Let go of the keys and values of a pass over prompts.

    With gradient checkpointing their graph holds the arguments of every layer until a backward pass, this cache among
    them: a circle that Python cannot collect. A backward pass puts keys and values back in place by itself.
    """
    for layer in prefix.layers:
        layer.keys = None  # type: ignore[union-attr]
        layer.values = None  # type: ignore[union-attr]
