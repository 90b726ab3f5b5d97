"""How is a matrix multiplied fastest on this machine?

On many CPUs oneDNN's kernels multiply float32 matrices faster than those that PyTorch calls by default, most of all few
rows by a weight in oneDNN's own layout; and some multiply bfloat16 more slowly than float32 (detoxrl.models.kernels,
measurements: docs/performance.md). Everywhere else PyTorch's public operators are used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear as torch_linear
from torch.overrides import TorchFunctionMode

from detoxrl.models.kernels import FEW_ROWS, kernels, onednn_layout, onednn_linear

# Weights are packed for products with so many rows.
_LAYOUT_FOR = 16
_Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the precision in which to multiply by a weight, which may be stored in less."""
    return _compute_dtype_on_cpu(weight.dtype) if weight.device.type == "cpu" else weight.dtype


def _compute_dtype_on_cpu(stored: torch.dtype) -> torch.dtype:
    return torch.float32 if stored == torch.bfloat16 and not kernels().bf16 else stored


def packed_dtype_on_cpu(stored: torch.dtype) -> torch.dtype | None:
    """Return the precision of the copies that `pack_weights` makes of weights.

    None stands for no copies: then PyTorch's own product is faster.
    """
    return _compute_dtype_on_cpu(stored) if kernels().packed else None


def _in_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b, computed in float32, in the precision of x."""
    multiply = onednn_linear if kernels().onednn else torch_linear
    product = multiply(x.float(), weight.float(), None if bias is None else bias.float())
    return product.to(x.dtype)


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> _Multiply | None:
    """Return what multiplies faster than PyTorch's own operator, None if nothing does."""
    if weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    if compute_dtype(weight) != weight.dtype:
        return _in_float32
    if weight.dtype == torch.float32 and x.dtype == torch.float32 and kernels().onednn:
        return onednn_linear
    return None


class _Linear(torch.autograd.Function):
    """x W^T + b with gradients, by a product that has no derivative of its own, or would keep more in memory."""

    @staticmethod
    def forward(
        ctx: Any, multiply: _Multiply, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.multiply = multiply
        # A frozen weight needs no x for its gradient, so x need not stay in memory until the backward pass.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        _, x_needs_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad
        grad_rows = grad.flatten(0, -2)

        grad_x = grad_weight = grad_bias = None
        if x_needs_grad:
            grad_x = ctx.multiply(grad, weight.t(), None)
        if weight_needs_grad:
            grad_weight = grad_rows.t() @ x.flatten(0, -2)  # oneDNN is slower than PyTorch at this shape
        if bias_needs_grad:
            grad_bias = grad_rows.sum(0)
        return None, grad_x, grad_weight, grad_bias


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + b for x (..., in), weight (out, in) and bias (out,), as `torch.nn.functional.linear` does.

    x may be in float32 where `compute_dtype` of a weight in bfloat16 is.
    """
    multiply = _multiply(x, weight)
    if multiply is None:
        return torch_linear(x, weight, bias)
    return _Linear.apply(multiply, x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]


def pack_weights(weights: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that multiplies x (rows, in) by several weights (out, in) at once, without gradients.

    The weights are stacked, so the result is (rows, sum of out). Where that is faster for few rows, the function holds
    a copy of the stack in oneDNN's own layout. The copy takes time to make, so packing pays off only for weights that
    are used many times, as in sampling. x is in `compute_dtype`.

    The last digits of a product depend on the layout and the kernel. So the layout is always the same, and the kernel
    follows from the rows of x alone: a resumed process may begin with a batch of another size.
    """

    def unpacked(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([linear(x, weight) for weight in weights], -1)

    dtype = packed_dtype_on_cpu(weights[0].dtype)
    if dtype is None or weights[0].device.type != "cpu":
        return unpacked

    packed = onednn_layout(torch.cat([weight.detach() for weight in weights]).to(dtype), _LAYOUT_FOR)
    for_any = kernels().onednn
    return lambda x: onednn_linear(x, packed) if for_any or len(x) <= FEW_ROWS else unpacked(x)


class FastLinear(TorchFunctionMode):
    """Sends every linear layer of a model inside the block, whoever wrote the model, through `linear`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch_linear and not kwargs:
            return linear(*args)
        return func(*args, **(kwargs or {}))
