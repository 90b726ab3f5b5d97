"""How is a matrix multiplied fastest on this machine?

On a CPU with AVX-512, oneDNN's kernels multiply float32 matrices faster than the kernels that PyTorch calls by default,
most of all when the weight is stored in oneDNN's own layout (measurements: docs/performance.md). PyTorch reaches these
kernels through private operators only. On other machines, and inside `without_onednn`, the public operators are used.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear as torch_linear
from torch.overrides import TorchFunctionMode

_ONEDNN_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
_ONEDNN_KERNELS = {
    torch.float32: _ONEDNN_AVX512,
    torch.bfloat16: _ONEDNN_AVX512 and bool(torch.cpu.get_capabilities().get("avx512_bf16", False)),
}
_onednn_allowed = True


@contextmanager
def without_onednn() -> Iterator[None]:
    """Use only public operators inside the block, as on a machine whose oneDNN has no fast kernels."""
    global _onednn_allowed
    _onednn_allowed = False
    try:
        yield
    finally:
        _onednn_allowed = True


def _has_kernel(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and has_kernel_on_cpu(weight.dtype)


def has_kernel_on_cpu(dtype: torch.dtype) -> bool:
    """Return whether this machine's CPU multiplies weights of a dtype by oneDNN, and packs copies of them."""
    return _onednn_allowed and _ONEDNN_KERNELS.get(dtype, False)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return torch_linear(x, weight, bias)  # in bfloat16 PyTorch calls oneDNN itself


class _Linear(torch.autograd.Function):
    """x W^T + b with gradients: the private operator has no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # A frozen weight needs no x for its gradient, so x need not stay in memory until the backward pass.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        x_needs_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad
        grad_rows = grad.flatten(0, -2)

        grad_x = grad_weight = grad_bias = None
        if x_needs_grad:
            grad_x = _multiply(grad, weight.t())
        if weight_needs_grad:
            grad_weight = grad_rows.t() @ x.flatten(0, -2)  # oneDNN is slower than PyTorch at this shape
        if bias_needs_grad:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + b for x (..., in), weight (out, in) and bias (out,), as `torch.nn.functional.linear` does."""
    if not _has_kernel(weight) or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return torch_linear(x, weight, bias)

    return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]


def pack_weights(weights: Sequence[torch.Tensor], rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that multiplies x (rows, in) by several weights (out, in) at once, without gradients.

    The weights are stacked, so the result is (rows, sum of out). Where oneDNN has fast kernels, the function holds a
    copy of the stack in oneDNN's own layout, chosen for this number of rows. The copy takes time to make, so packing
    pays off only for weights that are used many times, as in sampling. Any number of rows gives a correct product.
    """
    if not _has_kernel(weights[0]):
        return lambda x: torch.cat([torch_linear(x, weight) for weight in weights], -1)

    stacked = torch.cat([weight.detach() for weight in weights])
    packed = torch.ops.mkldnn._reorder_linear_weight(stacked, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


class FastLinear(TorchFunctionMode):
    """Sends every linear layer of a model inside the block, whoever wrote the model, through `linear`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch_linear and not kwargs:
            return linear(*args)
        return func(*args, **(kwargs or {}))
