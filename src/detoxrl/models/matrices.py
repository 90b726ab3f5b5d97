"""How is a weight multiplied under a LoRA, without adding the LoRA to it?

A LoRA changes a weight W by scale * B A, of rank r. Adding that to W would copy every matrix for every adapter. Instead
A and then B are applied to the input: two products with a side of only r. Where a decoder writes token by token, the
weights with the same input are stacked and packed into one product, and so are their LoRAs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from detoxrl.models.linear import compute_dtype, linear, pack_weights

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Lora:
    """The factors of a LoRA (Hu et al. 2021, section 4.1): W x becomes W x + scale * B A x."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scale: float

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return B A x (..., out) for x (..., in), unscaled.

        The factors and their gradients are float32. The products are computed in the precision of x.
        """
        return linear(linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


@dataclass(frozen=True)
class Matrix:
    """A weight (out, in) of the base model, its bias (out,) if there is one, and the LoRA on it, if there is one."""

    weight: torch.Tensor
    lora: Lora | None = None
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (..., out) with x (..., in)."""
        product = linear(x, self.weight, self.bias)
        if self.lora is None:
            return product
        return torch.add(product, self.lora.product(x), alpha=self.lora.scale)


def matrix_of(module: Any, adapter: str | None) -> Matrix:
    """Return the weight of a linear layer under an adapter; None is the bare base."""
    if type(module) is not LoraLinear:
        return Matrix(module.weight, bias=module.bias)

    layer: Any = module
    base = layer.base_layer
    if adapter not in layer.lora_A:
        return Matrix(base.weight, bias=base.bias)

    lora = Lora(a=layer.lora_A[adapter].weight, b=layer.lora_B[adapter].weight, scale=layer.scaling[adapter])
    return Matrix(base.weight, lora, base.bias)


def is_plain(module: Any, is_linear: bool) -> bool:
    """Return whether a module has nothing added but, if `matrix_of` reads it as a linear layer, LoRAs."""
    if not is_linear:
        return not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)

    # A variant is DoRA, for example, which is more than two factors.
    is_plain_lora = type(module) is LoraLinear and not module.lora_variant and not any(module.lora_bias.values())
    return is_plain_lora or type(module) is torch.nn.Linear


# Token by token


def packed_stack(matrices: Sequence[Matrix]) -> Function:
    """Return the product with several matrices that have the same input, without their LoRAs."""
    product = pack_weights([matrix.weight for matrix in matrices])
    biases = [matrix.bias for matrix in matrices]
    if all(bias is None for bias in biases):
        return product

    added = [
        matrix.weight.new_zeros(len(matrix.weight)) if matrix.bias is None else matrix.bias.detach()
        for matrix in matrices
    ]
    bias = torch.cat(added)
    return lambda x: product(x).add_(bias)


def with_lora(product: Function, matrices: Sequence[Matrix]) -> Function:
    """Return a product of stacked matrices plus what their LoRAs add, in the precision of the products.

    The LoRAs of a stack also have the same input x, so they need two thin products together instead of two each. Their
    A are stacked, and their B, times the scales, are the blocks of a block-diagonal matrix: each B meets its own A x
    alone. A matrix without a LoRA has a block of zero columns. Gradients do not flow through the result.
    """
    dtype = compute_dtype(matrices[0].weight)
    loras = [matrix.lora for matrix in matrices if matrix.lora is not None]
    if not loras:
        return product

    blocks = []
    for matrix in matrices:
        if matrix.lora is None:
            blocks.append(loras[0].a.new_zeros(len(matrix.weight), 0))
        else:
            blocks.append(matrix.lora.b * matrix.lora.scale)

    # Transposed and made contiguous once here, instead of in every product: a (in, R), b (R, sum of out).
    a = torch.cat([lora.a for lora in loras]).t().to(dtype).contiguous()
    b = torch.block_diag(*blocks).t().to(dtype).contiguous()
    return lambda x: torch.addmm(product(x), x @ a, b)
