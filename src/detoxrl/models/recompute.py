"""How does a backward pass recompute activations instead of keeping them?

Of each layer only the input is kept, and the layer is computed again when the backward pass reaches it: gradient
checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174). transformers offers it too, but only together with
dropout, because both are switched on by a layer's train mode.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

Context = Callable[[], AbstractContextManager[Any]]


def recomputed(function: Callable[..., Any], *args: Any, context: Context = nullcontext, **settings: Any) -> Any:
    """Return function(*args, **settings), whose activations the backward pass recomputes inside a `context`.

    Without gradients nothing would be kept, so the function is only called.
    """
    if not torch.is_grad_enabled():
        return function(*args, **settings)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), context()

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **settings)


def layers_to_recompute(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of a model of transformers that can each be recomputed as a whole."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def recomputing_layers(model: torch.nn.Module, context: Context = nullcontext) -> Iterator[None]:
    """Have the backward pass recompute the layers that the model computes inside the block, each in a `context`.

    A layer that is computed again updates its cache again, so the model must be called without one, or with one that
    bears it (`models/prefix`).
    """
    layers: list[Any] = layers_to_recompute(model)
    for layer in layers:
        layer.forward = partial(recomputed, layer.forward, context=context)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # What lies below is the forward of the layer's class.
