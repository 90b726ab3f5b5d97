"""How is a matrix multiplied fastest?

On a CPU with AVX-512 oneDNN's own kernels multiply float32 faster than what PyTorch calls, the more so in its own
layout (docs/performance.md). They are private operators of torch: elsewhere, and under `without_onednn`, the public ones serve.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear as torch_linear
from torch.overrides import TorchFunctionMode

_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
_KERNELS = {
    torch.float32: _WIDE,
    torch.bfloat16: _WIDE and bool(torch.cpu.get_capabilities().get("avx512_bf16", False)),
}
_allowed = True


@contextmanager
def without_onednn() -> Iterator[None]:
    """Let products inside the block use public operators alone, as they do where there is no oneDNN."""
    global _allowed
    _allowed = False
    try:
        yield
    finally:
        _allowed = True


def _has_kernel(weight: torch.Tensor) -> bool:
    return _allowed and weight.device.type == "cpu" and _KERNELS.get(weight.dtype, False)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if weight.dtype == torch.float32:  # in bfloat16 PyTorch calls oneDNN itself
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return torch_linear(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        by_x, by_weight, by_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if by_x else None,
            rows.t() @ x.flatten(0, -2) if by_weight else None,  # oneDNN is slower at this shape
            rows.sum(0) if by_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + b, as `torch.nn.functional.linear` does: x (..., in), weight (out, in), bias (out,)."""
    if not _has_kernel(weight) or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return torch_linear(x, weight, bias)
    return _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]


def pack_weights(weights: Sequence[torch.Tensor], rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that multiplies x (rows, in) by W^T without gradient, for weights (out, in) one below another.

    Where oneDNN is used it holds a copy of them in the layout that suits few rows best.
    """
    if not _has_kernel(weights[0]):
        return lambda x: torch.cat([torch_linear(x, weight) for weight in weights], -1)
    copy = torch.ops.mkldnn._reorder_linear_weight(torch.cat([weight.detach() for weight in weights]), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, copy, None, "none", [], "")


class FastLinear(TorchFunctionMode):
    """Has every linear layer of a model of somebody else's go through `linear`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch_linear and not kwargs:
            return linear(*args)
        return func(*args, **(kwargs or {}))
