"""How does a T5 run as fast as its matrix products allow?

This is the forward pass of T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683) and mT5 written out as plain
functions of tensors, gated as in FLAN-T5 or not, under full weights or with a LoRA on any of its matrices. It computes
what transformers computes and is tested against it. It is faster for six reasons (measurements: docs/performance.md):

- **No padding.** All tokens of a pass are the rows of one matrix, so that no product has a row for padding. Only
  attention sees them as padded sequences.
- **Thin LoRA products**, which change no weight (detoxrl.models.matrices).
- **Shared cross-attention.** The keys and values of cross-attention are products of the encoder's states and the base
  weights. If neither changes in training, they are computed once (`T5Network.with_shared_cross`) for sampling, the
  reference and every epoch of the update. A pass under an adapter adds only what its LoRA changes.
- **Packed weights.** Sampling reads every weight once per token, for a few rows. `T5Steps` therefore copies the weights
  into the layout that suits few rows, and stacks those with the same input (query, key, value) into one product.
- **A chunked head.** Log-probs are computed from the hidden states a chunk of tokens at a time, so that the logits of a
  whole batch never exist at once (detoxrl.models.token_logprobs).
- **The faster attention of two.** torch's fused attention is faster on a CPU in float32, without gradients and for more
  than one query. Everywhere else two plain products are (`_attend`).

In comments, B is the batch, P the prompt length, T the response length, D the model's width, H the number of heads,
d the width of a head, L the number of decoder layers and V the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration

from detoxrl.models.ends import start_token_ids
from detoxrl.models.groups import closed_up
from detoxrl.models.linear import compute_dtype, linear, pack_weights
from detoxrl.models.matrices import Function, Matrix, is_plain, matrix_of, packed_stack, with_lora
from detoxrl.models.recompute import recomputed
from detoxrl.models.sequences import Sequences
from detoxrl.models.token_logprobs import select_tokens, token_logprobs
from detoxrl.models.types import Encoded
from detoxrl.models.weights import Weights

_CLASSES = (T5ForConditionalGeneration, MT5ForConditionalGeneration)
# Names of the linear layers inside T5's blocks, on which a LoRA may lie.
_LINEAR_LAYERS = {"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"}
# Number of prompt tokens whose shared keys or values are computed at once, so that they are still in the CPU's cache
# when they are written to their place.
_SHARED_BLOCK = 2048


# The weights


class Attention(NamedTuple):
    """The weights of a self-attention or cross-attention sublayer."""

    norm: torch.Tensor  # (D,)
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix


class FeedForward(NamedTuple):
    """The weights of a feed-forward sublayer: `narrow` of the activation of `wide`."""

    norm: torch.Tensor  # (D,)
    wide: tuple[Matrix, ...]  # One matrix, or two where the second gates the activation of the first.
    narrow: Matrix
    activation: Function


class EncoderLayer(NamedTuple):
    """The weights of a block of the encoder."""

    self_attention: Attention
    feed_forward: FeedForward


class DecoderLayer(NamedTuple):
    """The weights of a block of the decoder."""

    self_attention: Attention
    cross_attention: Attention
    feed_forward: FeedForward


# The weights as they lie in a model of transformers


def is_plain_t5(weights: Weights) -> bool:
    """Return whether `T5Network` can compute the model: a T5 or mT5 with nothing added, under any name, but LoRAs."""
    model = weights.active
    if type(model) not in _CLASSES or type(model.lm_head) is not torch.nn.Linear:
        return False
    if len(start_token_ids(model)) > 1:  # `T5Network` begins with the start token alone.
        return False

    modules = (*model.encoder.named_modules(), *model.decoder.named_modules())
    return all(is_plain(module, name.rpartition(".")[2] in _LINEAR_LAYERS) for name, module in modules)


def _attention(norm: Any, attention: Any, adapter: str | None) -> Attention:
    return Attention(
        norm=norm.weight,
        q=matrix_of(attention.q, adapter),
        k=matrix_of(attention.k, adapter),
        v=matrix_of(attention.v, adapter),
        o=matrix_of(attention.o, adapter),
    )


def _feed_forward(sublayer: Any, adapter: str | None) -> FeedForward:
    dense = sublayer.DenseReluDense
    is_gated = "wi_0" in dict(dense.named_children())
    wide = (dense.wi_0, dense.wi_1) if is_gated else (dense.wi,)
    return FeedForward(
        norm=sublayer.layer_norm.weight,
        wide=tuple(matrix_of(module, adapter) for module in wide),
        narrow=matrix_of(dense.wo, adapter),
        activation=dense.act,
    )


def _encoder_layer(block: Any, adapter: str | None) -> EncoderLayer:
    attention, dense = block.layer
    return EncoderLayer(
        self_attention=_attention(attention.layer_norm, attention.SelfAttention, adapter),
        feed_forward=_feed_forward(dense, adapter),
    )


def _decoder_layer(block: Any, adapter: str | None) -> DecoderLayer:
    attention, cross, dense = block.layer
    return DecoderLayer(
        self_attention=_attention(attention.layer_norm, attention.SelfAttention, adapter),
        cross_attention=_attention(cross.layer_norm, cross.EncDecAttention, adapter),
        feed_forward=_feed_forward(dense, adapter),
    )


# Attention and feed-forward


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return attention (B, n, H * d) of queries (B, H, n, d) to keys and values (B, H, m, d).

    The bias, which broadcasts to (B, H, n, m), is added to the scores. T5 does not divide the scores by sqrt(d).
    """
    if q.dtype == torch.float32 and q.shape[2] > 1 and not torch.is_grad_enabled():
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2).flatten(2)

    scores = q @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _attend_to_prompts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return attention (B, n, H * d) of queries (B, H, n, d) to the keys and values (U, H, P, d) of U prompts.

    B / U consecutive rows answer one prompt. They attend to it as one row of so many more queries.
    """
    batch, _, length, _ = q.shape
    group_size = batch // len(k)
    if group_size > 1:
        q = q.unflatten(0, (len(k), group_size)).transpose(1, 2).flatten(2, 3)
    return _attend(q, k, v, bias).reshape(batch, length, -1)


def _narrowed(wide: Sequence[torch.Tensor], narrow: Function, activation: Function) -> torch.Tensor:
    """Return the output (..., D) of a feed-forward sublayer from its one or two widened states (..., F)."""
    activated = activation(wide[0])
    if len(wide) == 2:
        activated = activated * wide[1]
    return narrow(activated)


# Whole sequences


class _Layout(NamedTuple):
    """What every decoder layer of a teacher-forced pass needs of its rows, which are tokens of responses."""

    responses: Sequences
    causal_bias: torch.Tensor  # (1, H, T, T)
    padding_bias: torch.Tensor | None  # (U, 1, 1, P), of the prompts.


class T5Network:
    """A T5 under the weights of one name, with the methods that `Policy` calls: the fast twin of `PlainNetwork`.

    It reads the factors of an adapter by their name, so no adapter has to be activated in peft for a pass.
    """

    def __init__(self, weights: Weights, adapter: str | None, checkpointing: bool = False) -> None:
        self.checkpointing = checkpointing
        self._weights = weights
        model, self._adapter = weights.of(adapter)

        decoder = model.decoder
        self.config = model.config
        self.encoder = model.encoder
        self._decoder = decoder
        self.layers = [_decoder_layer(block, self._adapter) for block in decoder.block]
        self._embedding = decoder.embed_tokens.weight
        self.norm = decoder.final_layer_norm.weight
        self.head = model.lm_head.weight
        self.dtype = compute_dtype(self.head)
        # A T5 whose head is tied to its embeddings scales the states before the head. An mT5 never does.
        scales = type(model) is T5ForConditionalGeneration and self.config.scale_decoder_outputs
        self.scale = self.config.d_model**-0.5 if scales else 1.0

    @staticmethod
    def max_tokens_per_pass(config: Any) -> int:
        """Return how many response tokens a pass without gradients should read: larger passes are no faster."""
        return 1024

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the encoder's hidden states (B, P, D) for prompts of token ids (B, P), 0 at padding."""
        prompts = Sequences(mask.bool())
        x = embedding(prompts.tokens_of(ids), self.encoder.embed_tokens.weight).to(self.dtype)
        bias = self._position_bias(self.encoder, ids.shape[1])
        padding_bias = prompts.padding_bias(x.dtype)
        if padding_bias is not None:
            bias = bias + padding_bias

        for block in self.encoder.block:
            layer = _encoder_layer(block, self._adapter)
            x = self._computed(partial(self._through_encoder_layer, layer, prompts, bias), x)
        return prompts.padded(self.normed(x, self.encoder.final_layer_norm.weight))

    def with_shared_cross(self, encoded: Encoded) -> Encoded:
        """Return the prompts with the keys and values of cross-attention under the bare base, without any LoRA.

        They are (L, 2, B, H, P, d), already split into heads. `cross_keys_values` adds the part of a LoRA.
        """
        batch, width, _ = encoded.states.shape
        cross = encoded.states.new_empty(len(self.layers), 2, batch, self.config.num_heads, width, self.config.d_kv)
        for (keys, values), layer in zip(cross, self.layers, strict=True):
            self._write_heads(encoded.states, layer.cross_attention.k.weight, keys)
            self._write_heads(encoded.states, layer.cross_attention.v.weight, values)
        return replace(encoded, cross=cross)

    def _write_heads(self, states: torch.Tensor, weight: torch.Tensor, heads: torch.Tensor) -> None:
        """Write the product of states (B, P, D) and a weight to `heads` (B, H, P, d), a block of rows at a time."""
        size = max(1, _SHARED_BLOCK // states.shape[1])
        for start in range(0, len(states), size):
            rows = slice(start, start + size)
            heads[rows] = self.split_heads(linear(states[rows], weight))

    def logprobs(
        self,
        encoded: Encoded,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        temperature: float,
        entropy_gradient: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probs and entropies (N,) of the N tokens of ids (B, T) under the mask, and hidden states (N, D).

        Without a mask, all B * T tokens count. Entropies have a gradient only with `entropy_gradient`.
        """
        counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        # A place is read if its token, which it predicts, or a later one counts.
        responses = Sequences(counts.flip(1).cummax(1).values.flip(1))
        start = ids.new_full((len(ids), 1), self.config.decoder_start_token_id)
        x = self.embed(responses.tokens_of(torch.cat([start, ids[:, :-1]], 1)))

        length = ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        causal_bias = self.position_bias(length).masked_fill(future, -torch.inf)
        layout = _Layout(responses, causal_bias, Sequences(encoded.mask.bool()).padding_bias(x.dtype))
        for i in range(len(self.layers)):
            x = self._computed(partial(self._through_decoder_layer, i, encoded, layout), x)

        states = self.normed(x, self.norm).index_select(0, select_tokens(responses.numbers(), mask))
        chosen_ids = select_tokens(ids, mask)
        chosen, entropy = token_logprobs(states * self.scale, self.head, chosen_ids, temperature, entropy_gradient)
        return chosen, entropy, states

    def _computed(self, layer: Function, x: torch.Tensor) -> torch.Tensor:
        """Return layer(x), which a backward pass recomputes if that is asked for."""
        output: torch.Tensor = recomputed(layer, x) if self.checkpointing else layer(x)
        return output

    def _through_encoder_layer(
        self, layer: EncoderLayer, prompts: Sequences, bias: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        x = self._self_attended(x, layer.self_attention, prompts, bias)
        return self._fed_forward(x, layer.feed_forward)

    def _through_decoder_layer(self, i: int, encoded: Encoded, layout: _Layout, x: torch.Tensor) -> torch.Tensor:
        layer = self.layers[i]
        x = self._self_attended(x, layer.self_attention, layout.responses, layout.causal_bias)
        x = self._cross_attended(x, i, encoded, layout)
        return self._fed_forward(x, layer.feed_forward)

    def cross_keys_values(self, i: int, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values (B, H, P, d) of cross-attention in decoder layer i, the LoRA's part included."""
        attention = self.layers[i].cross_attention
        if encoded.cross is None:
            keys = self.split_heads(attention.k(encoded.states))
            values = self.split_heads(attention.v(encoded.states))
            return keys, values

        keys, values = encoded.cross[i]
        keys = self._with_lora_part(keys, attention.k, encoded)
        values = self._with_lora_part(values, attention.v, encoded)
        return keys, values

    def _with_lora_part(self, shared: torch.Tensor, matrix: Matrix, encoded: Encoded) -> torch.Tensor:
        """Return shared keys or values (C, H, P', d), cut to the prompts (B, H, P, d), with what the LoRA adds."""
        heads = shared[:, :, : encoded.states.shape[1]]
        if encoded.rows is not None:
            heads = heads[encoded.rows]
        if matrix.lora is None:
            return heads

        change = self.split_heads(matrix.lora.product(encoded.states))
        return torch.add(heads, change, alpha=matrix.lora.scale)

    def _self_attended(
        self, x: torch.Tensor, attention: Attention, sequences: Sequences, bias: torch.Tensor
    ) -> torch.Tensor:
        """Return x (N, D), the tokens of sequences, with what they attend to in their own."""
        n = self.normed(x, attention.norm)
        q, k, v = (self.split_heads(sequences.padded(matrix(n))) for matrix in (attention.q, attention.k, attention.v))
        return x + attention.o(sequences.tokens_of(_attend(q, k, v, bias)))

    def _cross_attended(self, x: torch.Tensor, i: int, encoded: Encoded, layout: _Layout) -> torch.Tensor:
        """Return x (N, D), the tokens of responses, with what they attend to in their prompts."""
        attention = self.layers[i].cross_attention
        n = self.normed(x, attention.norm)
        q = self.split_heads(layout.responses.padded(attention.q(n)))
        keys, values = self.cross_keys_values(i, encoded)
        attended = _attend_to_prompts(q, keys, values, layout.padding_bias)
        return x + attention.o(layout.responses.tokens_of(attended))

    def _fed_forward(self, x: torch.Tensor, layer: FeedForward) -> torch.Tensor:
        n = self.normed(x, layer.norm)
        wide = [matrix(n) for matrix in layer.wide]
        return x + _narrowed(wide, layer.narrow, layer.activation)

    def steps(self, encoded: Encoded, length: int, group_size: int) -> "T5Steps":
        """Return an object that decodes responses of up to `length` tokens to the prompts, token by token."""
        return T5Steps(self, encoded, length, group_size)

    def packed(self) -> "_PackedWeights":
        """Return the products with all decoder weights, without LoRAs."""

        def pack() -> _PackedWeights:
            return _PackedWeights(pack_weights([self.head]), [_packed_layer(layer) for layer in self.layers])

        return self._weights.packed(pack)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (..., D) of token ids (...) in the decoder, in the precision of the pass."""
        return embedding(ids, self._embedding).to(self.dtype)

    def position_bias(self, length: int) -> torch.Tensor:
        """Return T5's relative position bias (1, H, n, n) for n tokens in the decoder, which all layers share."""
        return self._position_bias(self._decoder, length)

    def _position_bias(self, stack: Any, length: int) -> torch.Tensor:
        bias: torch.Tensor = stack.block[0].layer[0].SelfAttention.compute_bias(length, length)
        return bias.to(self.dtype)

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return x (..., D) divided by its root mean square and multiplied by a weight (D,)."""
        normed: torch.Tensor = rms_norm(x, weight.shape, weight.to(x.dtype), self.config.layer_norm_epsilon)
        return normed

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (B, n, H * d) as a view (B, H, n, d)."""
        heads: torch.Tensor = x.unflatten(-1, (self.config.num_heads, -1)).transpose(-3, -2)
        return heads


# Token by token


class _LayerProducts(NamedTuple):
    """The products of one decoder layer in sampling. Matrices with the same input are stacked into one product."""

    qkv: Function
    self_o: Function
    cross_q: Function
    cross_o: Function
    wide: Function
    narrow: Function


class _PackedWeights(NamedTuple):
    head: Function
    layers: list[_LayerProducts]


def _stacks(layer: DecoderLayer) -> tuple[tuple[Matrix, ...], ...]:
    """Return the matrices that each field of `_LayerProducts` stacks, in the order of the fields."""
    own, cross, feed_forward = layer
    return (own.q, own.k, own.v), (own.o,), (cross.q,), (cross.o,), feed_forward.wide, (feed_forward.narrow,)


def _packed_layer(layer: DecoderLayer) -> _LayerProducts:
    return _LayerProducts(*map(packed_stack, _stacks(layer)))


def _with_loras(products: _LayerProducts, layer: DecoderLayer) -> _LayerProducts:
    return _LayerProducts(*map(with_lora, products, _stacks(layer)))


class T5Steps:
    """Decodes a batch token by token, without gradients.

    It holds packed copies of the weights, the keys and values of the prompts, and room for those of the whole response,
    which are written in place instead of being appended. Make it under `torch.no_grad()`.
    """

    def __init__(self, network: T5Network, encoded: Encoded, length: int, group_size: int) -> None:
        batch = len(encoded.states) * group_size
        packed = network.packed()
        self._network = network
        self._head = packed.head
        layers = zip(packed.layers, network.layers, strict=True)
        self._products = [_with_loras(products, layer) for products, layer in layers]

        self._cross: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i in range(len(network.layers)):
            keys, values = network.cross_keys_values(i, encoded)
            # Every token reads them, so they are copied once if they are not contiguous.
            self._cross.append((keys.contiguous(), values.contiguous()))
        self._padding_bias = Sequences(encoded.mask.bool()).padding_bias(encoded.states.dtype)
        self._group_size = group_size
        # Each row's place among those of all prompts, `group_size` to a prompt.
        self._places = torch.arange(batch, device=encoded.mask.device)

        self._heads: int = network.config.num_heads
        self._position_bias = network.position_bias(length)
        # Keys and values (L, 2, B, H, T, d) of the response's own tokens. They are in float32 even under bfloat16
        # weights, because a CPU multiplies few rows of bfloat16 more slowly, and they take little memory.
        sizes = (len(network.layers), 2, batch, self._heads, length, network.config.d_kv)
        self._own = self._position_bias.new_empty(sizes, dtype=torch.float32)
        self._done = 0  # tokens decoded so far

    @torch.inference_mode()
    def next(self, tokens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, V) and hidden states (B, D) that predict the token after `tokens` (B,).

        At the first call `tokens` is None: the first token follows from the prompt alone.
        """
        network = self._network
        if tokens is None:
            start = network.config.decoder_start_token_id
            tokens = torch.full((self._own.shape[2],), start, device=self._own.device)

        x = network.embed(tokens)
        t = self._done
        bias = self._position_bias[:, :, t : t + 1, : t + 1]
        for layer, products, own, cross in zip(network.layers, self._products, self._own, self._cross, strict=True):
            n = network.normed(x, layer.self_attention.norm)
            x = x + products.self_o(self._self_attended(products.qkv(n), own, bias).to(x.dtype))

            n = network.normed(x, layer.cross_attention.norm)
            q = products.cross_q(n).unflatten(1, (self._heads, -1))
            x = x + products.cross_o(self._cross_attended(q, *cross))

            n = network.normed(x, layer.feed_forward.norm)
            wide = products.wide(n).chunk(len(layer.feed_forward.wide), -1)
            x = x + _narrowed(wide, products.narrow, layer.feed_forward.activation)

        self._done += 1
        states = network.normed(x, network.norm)
        return self._head(states * network.scale), states

    def _self_attended(self, qkv: torch.Tensor, own: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return self-attention (B, H * d) of the newest token; `qkv` is its query, key and value (B, 3 * H * d).

        The key and value join those of the earlier tokens in `own` (2, B, H, T, d).
        """
        q, k, v = qkv.unflatten(1, (3, self._heads, -1)).unbind(1)
        keys, values = own

        t = self._done
        keys[:, :, t] = k
        values[:, :, t] = v
        return _attend(q[:, :, None].float(), keys[:, :, : t + 1], values[:, :, : t + 1], bias)[:, 0]

    def _cross_attended(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return attention (B, H * d) of queries (B, H, d) to the keys and values (U, H, P, d) of their prompts."""
        places = len(keys) * self._group_size
        if places == len(q):
            return _attend_to_prompts(q[:, :, None], keys, values, self._padding_bias)[:, 0]

        # Some responses of a group have ended. Their places stay, because all groups need the same size.
        placed = q.new_zeros(places, *q.shape[1:]).index_copy(0, self._places, q)
        return _attend_to_prompts(placed[:, :, None], keys, values, self._padding_bias)[self._places, 0]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows of the batch but those that are True in `rows` (B,), and prompts without rows."""
        self._own = self._own[:, :, rows]
        self._places, prompts = closed_up(self._places[rows], self._group_size)
        if len(prompts) < len(self._cross[0][0]):
            self._cross = [(keys[prompts], values[prompts]) for keys, values in self._cross]
            self._padding_bias = None if self._padding_bias is None else self._padding_bias[prompts]
