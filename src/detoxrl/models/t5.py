"""How does a T5 run as fast as its matrices allow?

Written out for T5 (Raffel et al. 2020), gated (FLAN-T5) or not, with a LoRA on any of its matrices. What a prompt means
to cross-attention is computed once for sampling, reference and update. Attention is two plain products but where a CPU
is faster with torch's fused one: in float32, without gradients, for more than one query (docs/performance.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from detoxrl.models.linear import linear, pack_weights
from detoxrl.models.token_logprobs import select_tokens, token_logprobs
from detoxrl.models.types import Encoded
from detoxrl.models.weights import LoraWeights, Weights

_Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Matrix:
    """A weight (out, in) and, where a LoRA changes it, its two factors (r, in) and (out, r), scaled."""

    weight: torch.Tensor
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product for x (..., in)."""
        return self.changed(linear(x, self.weight), x)

    def changed(self, found: torch.Tensor, x: torch.Tensor, shape: _Product = lambda added: added) -> torch.Tensor:
        """Return a product without the LoRA, `found`, with what the LoRA adds for x in the shape of `found`.

        The LoRA computes in the precision of the weight; it is kept, and its gradient summed up, in float32.
        """
        if self.down is None or self.up is None:
            return found
        added = linear(linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return torch.add(found, shape(added), alpha=self.scale)


class Layer(NamedTuple):
    """The matrices and norms of one block: self-attention, cross-attention, feed-forward."""

    own: tuple[Matrix, ...]
    """Query, key, value and output of self-attention."""
    cross: tuple[Matrix, ...]
    """The same of cross-attention."""
    wide: tuple[Matrix, ...]
    narrow: Matrix
    norms: tuple[torch.Tensor, ...]
    activation: _Product


def fits(weights: Weights) -> bool:
    """Return whether the model is a T5 with nothing on it, under any name, but plain LoRAs."""
    model = weights.active
    if type(model) is not T5ForConditionalGeneration or type(model.lm_head) is not torch.nn.Linear:
        return False

    def known(name: str, part: Any) -> bool:
        if name.rpartition(".")[2] not in _MATRICES:
            return not isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)
        lora = type(part) is LoraLinear and not part.lora_variant and not any(part.lora_bias.values())
        return lora or type(part) is torch.nn.Linear

    stacks = (*model.encoder.named_modules(), *model.decoder.named_modules())
    return all(known(name, part) for name, part in stacks)


_MATRICES = {"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"}


def _matrix(module: Any, adapter: str | None) -> Matrix:
    if type(module) is not LoraLinear:
        return Matrix(module.weight)
    lora: Any = module
    if adapter not in lora.lora_A:
        return Matrix(lora.base_layer.weight)
    a, b = lora.lora_A[adapter].weight, lora.lora_B[adapter].weight
    return Matrix(lora.base_layer.weight, a, b, lora.scaling[adapter])


def _qkvo(attention: Any, matrix: Callable[[Any], Matrix]) -> tuple[Matrix, ...]:
    return tuple(matrix(getattr(attention, name)) for name in ("q", "k", "v", "o"))


def _wide_narrow(feed: Any, matrix: Callable[[Any], Matrix]) -> tuple[tuple[Matrix, ...], Matrix]:
    wide = (feed.wi_0, feed.wi_1) if isinstance(feed, T5DenseGatedActDense) else (feed.wi,)
    return tuple(map(matrix, wide)), matrix(feed.wo)


def _layer(block: Any, matrix: Callable[[Any], Matrix]) -> Layer:
    own, cross, dense = block.layer
    norms = tuple(part.layer_norm.weight for part in (own, cross, dense))
    wide, narrow = _wide_narrow(dense.DenseReluDense, matrix)
    heads = _qkvo(own.SelfAttention, matrix), _qkvo(cross.EncDecAttention, matrix)
    return Layer(*heads, wide, narrow, norms, dense.DenseReluDense.act)


def _feed_forward(wide: Sequence[torch.Tensor], narrow: _Product, activation: _Product) -> torch.Tensor:
    """Return the layer's output for the widened states, each (..., F), two where it is gated."""
    gate, *rest = wide
    return narrow(activation(gate) * rest[0] if rest else activation(gate))


class T5Network:
    """A T5 under the weights of one name, as `Policy` wants it."""

    def __init__(self, weights: Weights, adapter: str | None) -> None:
        lora = isinstance(weights, LoraWeights)
        model = weights.active if lora else weights.models[adapter]
        self._matrix = partial(_matrix, adapter=adapter if lora else None)
        self.packs: list[Any] | None = weights.packs if isinstance(weights, LoraWeights) else None
        self.config, stack, self.encoder = model.config, model.decoder, model.encoder
        self.layers = [_layer(block, self._matrix) for block in stack.block]
        self.embedding, self.head = stack.embed_tokens.weight, model.lm_head.weight
        self.norm = stack.final_layer_norm.weight
        self._position: Callable[[int, int], torch.Tensor] = stack.block[0].layer[0].SelfAttention.compute_bias
        self.scale = self.config.d_model**-0.5 if self.config.scale_decoder_outputs else 1.0

    @staticmethod
    def most_tokens(config: Any) -> int:
        """Return how many tokens of responses one pass without a gradient reads: more is no faster."""
        return 1024

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the encoder's states (B, P, D) for prompts of tokens ids (B, P)."""
        x, length = embedding(ids, self.encoder.embed_tokens.weight), ids.shape[1]
        bias, unread = self.encoder.block[0].layer[0].SelfAttention.compute_bias(length, length), _unread(mask, x)
        bias = bias if unread is None else bias + unread
        for block in self.encoder.block:
            own, dense = block.layer
            (q, k, v, o), n = _qkvo(own.SelfAttention, self._matrix), self._normed(x, own.layer_norm.weight)
            x = x + o(_attend(self._heads(q(n)), self._heads(k(n)), self._heads(v(n)), bias))
            feed, n = dense.DenseReluDense, self._normed(x, dense.layer_norm.weight)
            wide, narrow = _wide_narrow(feed, self._matrix)
            x = x + _feed_forward([one(n) for one in wide], narrow, feed.act)
        return self._normed(x, self.encoder.final_layer_norm.weight)

    def shared(self, encoded: Encoded) -> Encoded:
        """Return the prompts with the keys and values that cross-attention has for them without any LoRA."""
        width = encoded.states.shape[1]
        sizes = (len(encoded.states), self.config.num_heads, width, self.config.d_kv)
        cross = encoded.states.new_empty(len(self.layers), 2, *sizes)
        for into, layer in zip(cross, self.layers, strict=True):
            for keys, matrix in zip(into, layer.cross[1:3], strict=True):
                size = max(1, 2048 // width)  # blocks that fit a cache
                for rows in (slice(start, start + size) for start in range(0, len(keys), size)):
                    keys[rows] = self._heads(linear(encoded.states[rows], matrix.weight))
        return replace(encoded, cross=cross)

    def logprobs(
        self, encoded: Encoded, ids: torch.Tensor, mask: torch.Tensor | None, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probs and entropies (N,) of the N tokens of ids (B, T) under the mask, and states (N, D).

        Without a mask all count.
        """
        start = ids.new_full((len(ids), 1), self.config.decoder_start_token_id)
        x = embedding(torch.cat([start, ids[:, :-1]], 1), self.embedding)
        ahead = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        bias = self._position(*ahead.shape).masked_fill(ahead, -torch.inf)
        unread = _unread(encoded.mask, x)
        for i, layer in enumerate(self.layers):
            (q, k, v, o), n = layer.own, self._normed(x, layer.norms[0])
            x = x + o(_attend(self._heads(q(n)), self._heads(k(n)), self._heads(v(n)), bias))
            (q, _, _, o), n = layer.cross, self._normed(x, layer.norms[1])
            x = x + o(_attend(self._heads(q(n)), *self.cross(i, encoded), unread))
            n = self._normed(x, layer.norms[2])
            x = x + _feed_forward([one(n) for one in layer.wide], layer.narrow, layer.activation)
        states = select_tokens(self._normed(x, self.norm), mask)
        chosen, entropy = token_logprobs(states * self.scale, self.head, select_tokens(ids, mask), temperature)
        return chosen, entropy, states

    def cross(self, i: int, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (B, H, P, d) of layer i for the prompts."""

        def found(which: int, matrix: Matrix) -> torch.Tensor:
            if encoded.cross is None:
                return self._heads(matrix(encoded.states))
            base = encoded.cross[i, which, :, :, : encoded.states.shape[1]]
            base = base if encoded.rows is None else base[encoded.rows]
            return matrix.changed(base, encoded.states, self._heads)

        _, keys, values, _ = self.layers[i].cross
        return found(0, keys), found(1, values)

    def steps(self, encoded: Encoded, length: int) -> "T5Steps":
        """Return what samples up to `length` tokens after the prompts, one at a time."""
        return T5Steps(self, encoded, length)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = rms_norm(x, weight.shape, weight, self.config.layer_norm_epsilon)
        return normed

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = x.unflatten(-1, (self.config.num_heads, -1)).transpose(-3, -2)
        return heads


def _unread(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    """Return what keeps attention from padding (B, 1, 1, P): 0 or -inf; None where there is none."""
    padding = mask == 0
    if padding.device.type != "meta" and not padding.any():
        return None
    return torch.zeros_like(padding, dtype=like.dtype).masked_fill(padding, -torch.inf)[:, None, None]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return (B, n, D) for queries (B, H, n, d); T5 does not scale its scores."""
    if q.dtype == torch.float32 and q.shape[2] > 1 and not torch.is_grad_enabled():
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2).flatten(2)
    scores = q @ k.transpose(-2, -1)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class _Packs(NamedTuple):
    """The products of one block with its weights alone, those of the same input together."""

    qkv: _Product
    o: _Product
    cross_q: _Product
    cross_o: _Product
    wide: _Product
    narrow: _Product


def _groups(layer: Layer) -> tuple[tuple[Matrix, ...], ...]:
    return layer.own[:3], layer.own[3:], layer.cross[:1], layer.cross[3:], layer.wide, (layer.narrow,)


def _with_lora(product: _Product, matrices: tuple[Matrix, ...]) -> _Product:
    """Return a product of stacked matrices with what their LoRAs add; without gradient, in the precision of x."""
    dtype = matrices[0].weight.dtype
    downs = [m.down for m in matrices if m.down is not None]
    if not downs:
        return product
    ups = [downs[0].new_zeros(len(m.weight), 0) if m.up is None else m.up * m.scale for m in matrices]
    down, up = torch.cat(downs).t().to(dtype).contiguous(), torch.block_diag(*ups).t().to(dtype).contiguous()
    return lambda x: torch.addmm(product(x), x @ down, up)


class T5Steps:
    """Decodes a batch token by token: packed copies of the weights, and keys and values in place. Under no_grad."""

    def __init__(self, decoder: T5Network, encoded: Encoded, length: int) -> None:
        self.decoder, rows = decoder, len(encoded.states)
        packs = decoder.packs or [
            pack_weights([decoder.head], rows),
            *(
                _Packs(*(pack_weights([m.weight for m in group], rows) for group in _groups(one)))
                for one in decoder.layers
            ),
        ]
        if decoder.packs is not None:
            decoder.packs[:] = packs
        self._head, *bare = packs
        self._products = [
            _Packs(*map(_with_lora, pack, _groups(layer))) for pack, layer in zip(bare, decoder.layers, strict=True)
        ]
        found = (decoder.cross(i, encoded) for i in range(len(decoder.layers)))
        self._cross = [(keys.contiguous(), values.contiguous()) for keys, values in found]  # read for every token
        self._unread = _unread(encoded.mask, encoded.states)
        self._bias = decoder._position(length, length)
        heads, depth = decoder.config.num_heads, decoder.config.d_kv
        # In fp32 whatever the weights are in: a CPU multiplies few rows of bfloat16 more slowly, and they are few.
        self._own = self._bias.new_empty(len(decoder.layers), 2, rows, heads, length, depth, dtype=torch.float32)
        self._done = 0

    @torch.inference_mode()
    def next(self, tokens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, V) and states (B, D) that predict what follows `tokens` (B,); None: what comes first."""
        decoder, t = self.decoder, self._done
        if tokens is None:
            start = decoder.config.decoder_start_token_id
            tokens = torch.full((self._own.shape[2],), start, device=self._own.device)
        bias, x = self._bias[:, :, t : t + 1, : t + 1], embedding(tokens, decoder.embedding)
        for i, (layer, own, cross) in enumerate(zip(decoder.layers, self._own, self._cross, strict=True)):
            by = self._products[i]
            q, *new = by.qkv(decoder._normed(x, layer.norms[0])).unflatten(1, (3, len(own[0, 0]), -1)).unbind(1)
            for kept, fresh in zip(own, new, strict=True):
                kept[:, :, t] = fresh
            keys, values = own[:, :, :, : t + 1]
            x = x + by.o(_attend(q[:, :, None].float(), keys, values, bias)[:, 0].to(x.dtype))
            q = by.cross_q(decoder._normed(x, layer.norms[1])).unflatten(1, (len(own[0, 0]), -1))
            x = x + by.cross_o(_attend(q[:, :, None], *cross, self._unread)[:, 0])
            wide = by.wide(decoder._normed(x, layer.norms[2])).chunk(len(layer.wide), -1)
            x = x + _feed_forward(wide, by.narrow, layer.activation)
        self._done += 1
        states = decoder._normed(x, decoder.norm)
        return self._head(states * decoder.scale), states

    def keep(self, rows: torch.Tensor) -> None:
        """Leave out all rows but those of a bool tensor."""
        self._own = self._own[:, :, rows]
        self._cross = [(keys[rows], values[rows]) for keys, values in self._cross]
        self._unread = None if self._unread is None else self._unread[rows]
