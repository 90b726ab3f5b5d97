"""How does a Llama, or a decoder built like it, run as fast as its matrix products allow?

This is the forward pass of Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971) written out as plain functions
of tensors, with what Qwen 2, Qwen 3, Mistral and Gemma do otherwise: biases, norms of queries and keys, and what norms
multiply by. It computes what transformers computes and is tested against it. It is faster for five reasons
(measurements: docs/log.md):

- **No padding.** All tokens of a pass, those of the prompts and those of the responses, are the rows of one matrix, so
  that no product has a row for padding. Only attention sees them as padded sequences.
- **Prompts read once.** The responses to a prompt attend to the same keys and values, in place: no response has a copy.
- **Thin LoRA products and packed weights** (detoxrl.models.matrices).
- **A chunked head.** Log-probs are computed from the hidden states a chunk of tokens at a time, and for no token of a
  prompt (detoxrl.models.token_logprobs).
- **A cache in place.** Sampling has room for the keys and values of whole responses, and writes those of a token there.

In comments, U is the number of prompts, P their length, k the number of responses to each, B = k * U, T the length of
responses, N the number of tokens of a pass, D the model's width, H the number of heads with keys and values of their
own, r the number of queries that share each of them, d the width of a head and V the vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import (
    GemmaForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from detoxrl.models.groups import closed_up
from detoxrl.models.linear import compute_dtype, pack_weights
from detoxrl.models.matrices import Function, Matrix, is_plain, matrix_of, packed_stack, with_lora
from detoxrl.models.recompute import recomputed
from detoxrl.models.sequences import Sequences
from detoxrl.models.token_logprobs import select_tokens, token_logprobs
from detoxrl.models.types import Encoded
from detoxrl.models.weights import Weights

_CLASSES = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, MistralForCausalLM, GemmaForCausalLM)
_LINEAR_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Rotary embeddings whose frequencies depend on the length of the sequences in a pass.
_ROTARY_BY_LENGTH = {"dynamic", "longrope"}


# The weights


class Layer(NamedTuple):
    """The weights of a block of the decoder."""

    attention_norm: torch.Tensor  # (D,)
    q: Matrix
    k: Matrix
    v: Matrix
    q_norm: torch.Tensor | None  # (d,) in Qwen 3.
    k_norm: torch.Tensor | None
    o: Matrix
    feed_forward_norm: torch.Tensor  # (D,)
    gate: Matrix
    up: Matrix
    down: Matrix
    activation: Function


def is_plain_llama(weights: Weights) -> bool:
    """Return whether `LlamaNetwork` can compute the model: a decoder of its family with nothing added but LoRAs."""
    model = weights.active
    if type(model) not in _CLASSES or type(model.lm_head) is not torch.nn.Linear:
        return False
    if _sees_a_window(model.config) or model.config.rope_parameters["rope_type"] in _ROTARY_BY_LENGTH:
        return False

    modules = model.model.named_modules()
    return all(is_plain(module, name.rpartition(".")[2] in _LINEAR_LAYERS) for name, module in modules)


def _sees_a_window(config: Any) -> bool:
    """Return whether some layer attends to the latest tokens alone."""
    if config.model_type == "mistral":
        return bool(config.sliding_window is not None)
    # Every layer of a Llama sees everything.
    return bool(config.model_type.startswith("qwen") and "sliding_attention" in config.layer_types)


def _norm_weight(norm: Any) -> torch.Tensor:
    """Return what a norm multiplies by (D,). Gemma stores it minus 1."""
    weight: torch.Tensor = norm.weight
    return weight.float() + 1 if type(norm) is GemmaRMSNorm else weight


def _layer(block: Any, adapter: str | None) -> Layer:
    attention = block.self_attn
    has_norms = "q_norm" in dict(attention.named_children())
    return Layer(
        attention_norm=_norm_weight(block.input_layernorm),
        q=matrix_of(attention.q_proj, adapter),
        k=matrix_of(attention.k_proj, adapter),
        v=matrix_of(attention.v_proj, adapter),
        q_norm=attention.q_norm.weight if has_norms else None,
        k_norm=attention.k_norm.weight if has_norms else None,
        o=matrix_of(attention.o_proj, adapter),
        feed_forward_norm=_norm_weight(block.post_attention_layernorm),
        gate=matrix_of(block.mlp.gate_proj, adapter),
        up=matrix_of(block.mlp.up_proj, adapter),
        down=matrix_of(block.mlp.down_proj, adapter),
        activation=block.mlp.act_fn,
    )


# Which row is which token


class _Layout(NamedTuple):
    """What every layer of a teacher-forced pass needs of its rows: those of the prompts first, then the responses'."""

    prompts: Sequences
    responses: Sequences
    turns: tuple[torch.Tensor, torch.Tensor]  # Cosines and sines (N, 1, d).
    padding_bias: torch.Tensor | None  # (U, 1, 1, P)


def _prompts_of(encoded: Encoded) -> tuple[torch.Tensor, Sequences]:
    """Return the token ids (n,) of prompts as rows, and where they stand. Each has at least one token.

    `encoded` pads them on the left.
    """
    mask = encoded.mask.bool()
    columns = torch.arange(mask.shape[1], device=mask.device)
    prompts = Sequences(columns < mask.sum(1, keepdim=True))
    ids = encoded.states.flatten() if prompts.is_full else encoded.states[mask]
    return ids, prompts


def _last_rows(prompts: Sequences) -> torch.Tensor:
    """Return the row (U,) of the last token of each prompt."""
    return prompts.mask.sum(1).cumsum(0) - 1


# Attention


def _rotated(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return x (..., d) turned by its position (Su et al. 2021, section 3.4.2, in the order of Llama's halves)."""
    cos, sin = turns
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _attend_within(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return attention (S, L, H * r, d) of queries of this shape to the keys and values (S, L, H, d) up to their own.

    Padding on the right is behind every token that counts.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True).transpose(1, 2)


def _attend_to_prompts_too(
    q: torch.Tensor,
    prompt: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    padding_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return attention (B, T, H * r, d) of responses' queries to their prompts and to their own earlier tokens.

    Keys and values are (U, P, H, d) of the prompts and (B, T, H, d) of the responses. One softmax spans both, while
    each is multiplied where it lies. Queries that share keys, of r heads and k responses, are rows of one product.
    """
    batch, length, queries, width = q.shape
    keys, values = (part.transpose(1, 2) for part in prompt)  # (U, H, P, d)
    number, heads, prompt_length, _ = keys.shape
    group_size = batch // number
    shared = queries // heads

    def grouped(x: torch.Tensor) -> torch.Tensor:
        """Return x (B, T, H * s, d) as (U, H, k, s, T, d)."""
        return x.view(number, group_size, length, heads, -1, width).permute(0, 3, 1, 4, 2, 5)

    grouped_q = grouped(q).reshape(number, heads, group_size, shared * length, width)
    own_keys, own_values = (grouped(part).squeeze(3) for part in own)  # (U, H, k, T, d)

    to_prompt = grouped_q.flatten(2, 3) @ keys.transpose(-2, -1)
    if padding_bias is not None:
        to_prompt = to_prompt + padding_bias
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1).repeat(shared, 1)
    to_own = (grouped_q @ own_keys.transpose(-2, -1)).masked_fill(future, -torch.inf)

    to_prompt = to_prompt.unflatten(2, (group_size, shared * length))
    weights = torch.cat((to_prompt, to_own), -1).softmax(-1, dtype=torch.float32).to(q.dtype)
    of_prompt, of_own = weights.split((prompt_length, length), -1)
    attended = (of_prompt.flatten(2, 3) @ values).view(grouped_q.shape) + of_own @ own_values

    by_head = attended.view(number, heads, group_size, shared, length, width)
    by_token: torch.Tensor = by_head.permute(0, 2, 4, 1, 3, 5).reshape(batch, length, queries, width)
    return by_token


# Whole sequences


class LlamaNetwork:
    """A decoder of Llama's family under the weights of one name, with the methods that `Policy` calls.

    It is the fast twin of `PlainNetwork`, and reads the factors of an adapter by their name, so no adapter has to be
    activated in peft for a pass.
    """

    def __init__(self, weights: Weights, adapter: str | None, checkpointing: bool = False) -> None:
        self.checkpointing = checkpointing
        self._weights = weights
        model, adapter = weights.of(adapter)

        body = model.model
        self.config = model.config
        self.layers = [_layer(block, adapter) for block in body.layers]
        self.norm = _norm_weight(body.norm)
        self.head = model.lm_head.weight
        self.dtype = compute_dtype(self.head)
        self._embed_tokens: Function = body.embed_tokens
        self.rotary = body.rotary_emb
        self.width: int = body.layers[0].self_attn.head_dim

    @staticmethod
    def max_tokens_per_pass(config: Any) -> int:
        """Return how many response tokens a pass without gradients should read: larger passes are no faster."""
        return 2048

    def with_shared_cross(self, encoded: Encoded) -> Encoded:
        """Return the prompts unchanged: every layer that reads them may train."""
        return encoded

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
        # A token is read if a later one counts.
        is_read = counts[:, 1:].flip(1).cummax(1).values.flip(1)
        responses = Sequences(is_read)
        prompt_ids, prompts = _prompts_of(encoded)
        states = self._states(prompt_ids, prompts, responses.tokens_of(ids[:, :-1]), responses)

        before = self._rows_before(prompts, responses)
        predicting = states.index_select(0, select_tokens(before, mask))
        chosen_ids = select_tokens(ids, mask)
        chosen, entropy = token_logprobs(predicting, self.head, chosen_ids, temperature, entropy_gradient)
        return chosen, entropy, predicting

    def _states(
        self, prompt_ids: torch.Tensor, prompts: Sequences, response_ids: torch.Tensor, responses: Sequences
    ) -> torch.Tensor:
        """Return the hidden states (N, D) of the tokens of prompts and responses."""
        x = self.embed(torch.cat((prompt_ids, response_ids)))
        group_size = len(responses.mask) // len(prompts.mask)
        lengths = prompts.mask.sum(1).repeat_interleave(group_size)
        behind_prompts = responses.tokens_of(lengths[:, None].expand(responses.mask.shape)) + responses.positions
        turns = self.turns(x, torch.cat((prompts.positions, behind_prompts)))
        layout = _Layout(prompts, responses, turns, prompts.padding_bias(x.dtype))

        for layer in self.layers:
            function = partial(self._through, layer, turns, partial(self._attended, layout))
            x = recomputed(function, x) if self.checkpointing else function(x)
        return self.normed(x, self.norm)

    def _rows_before(self, prompts: Sequences, responses: Sequences) -> torch.Tensor:
        """Return the row of the token before each token of the responses (B, T), undefined where it was not read."""
        last = _last_rows(prompts).repeat_interleave(len(responses.mask) // len(prompts.mask))
        return torch.cat((last[:, None], responses.numbers() + len(prompts)), 1)

    def _through(
        self,
        layer: Layer,
        turns: tuple[torch.Tensor, torch.Tensor],
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        x: torch.Tensor,
    ) -> torch.Tensor:
        """Return the states (n, D) that a layer makes of x (n, D).

        `attend` makes (n, H * r * d) of queries (n, H * r, d), keys and values (n, H, d).
        """
        n = self.normed(x, layer.attention_norm)
        q, k, v = self.heads(layer, (layer.q(n), layer.k(n), layer.v(n)), turns)
        x = x + layer.o(attend(q, k, v))

        n = self.normed(x, layer.feed_forward_norm)
        return x + layer.down(layer.activation(layer.gate(n)) * layer.up(n))

    def _attended(self, layout: _Layout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return attention (N, H * r * d) of queries (N, H * r, d) to keys and values (N, H, d)."""
        prompts = layout.prompts
        responses = layout.responses
        sizes = (len(prompts), len(responses))
        of_prompts, of_responses = zip(*(part.split(sizes) for part in (q, k, v)), strict=True)

        q, k, v = (prompts.padded(part) for part in of_prompts)
        attended = [prompts.tokens_of(_attend_within(q, k, v))]
        if len(responses) > 0:
            own_q, own_k, own_v = (responses.padded(part) for part in of_responses)
            by_response = _attend_to_prompts_too(own_q, (k, v), (own_k, own_v), layout.padding_bias)
            attended.append(responses.tokens_of(by_response))
        return torch.cat(attended).flatten(1)

    def read_prompts(self, encoded: Encoded, dtype: torch.dtype) -> "_ReadPrompts":
        """Return what sampling needs of U prompts, each of which is read once. Keys and values are in `dtype`."""
        ids, prompts = _prompts_of(encoded)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (prompts.padded(part) for part in (q, k, v))
            keys = k.permute(0, 2, 3, 1).to(dtype).contiguous()
            values = v.transpose(1, 2).to(dtype).contiguous()
            kept.append((keys, values))
            return prompts.tokens_of(_attend_within(q, k, v)).flatten(1)

        x = self.embed(ids)
        turns = self.turns(x, prompts.positions)
        for layer in self.layers:
            x = self._through(layer, turns, attend, x)
        states = self.normed(x[_last_rows(prompts)], self.norm)
        return _ReadPrompts(states, kept, prompts.mask.sum(1), prompts.padding_bias(dtype))

    def heads(
        self, layer: Layer, products: Sequence[torch.Tensor], turns: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries (n, H * r, d), keys and values (n, H, d) from the products with their weights."""
        q, k, v = (product.unflatten(-1, (-1, self.width)) for product in products)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self.normed(q, layer.q_norm)
            k = self.normed(k, layer.k_norm)
        # Scaled here: there are fewer queries than scores.
        return _rotated(q, turns) * self.width**-0.5, _rotated(k, turns), v

    def turns(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines (n, 1, d), in the dtype of x, by which positions (n,) turn queries and keys."""
        cos, sin = self.rotary(x, positions[None])
        return cos[0, :, None], sin[0, :, None]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (n, D) of token ids (n,), in the precision of the pass."""
        return self._embed_tokens(ids).to(self.dtype)

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return x (..., D) divided by its root mean square and multiplied by a weight (D,)."""
        normed: torch.Tensor = rms_norm(x, weight.shape, weight.to(x.dtype), self.config.rms_norm_eps)
        return normed

    def steps(self, encoded: Encoded, length: int, group_size: int) -> "LlamaSteps":
        """Return an object that decodes responses of up to `length` tokens to the prompts, token by token."""
        return LlamaSteps(self, encoded, length, group_size)

    def packed(self) -> "_PackedWeights":
        """Return the products with all weights, without LoRAs."""

        def pack() -> _PackedWeights:
            layers = [_LayerProducts(*map(packed_stack, _stacks(layer))) for layer in self.layers]
            return _PackedWeights(pack_weights([self.head]), layers)

        return self._weights.packed(pack)


# Token by token


class _ReadPrompts(NamedTuple):
    """What sampling needs of prompts that were read."""

    states: torch.Tensor  # (U, D) of their last tokens.
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]  # Of each layer: keys (U, H, d, P), values (U, H, P, d).
    lengths: torch.Tensor  # (U,)
    padding_bias: torch.Tensor | None  # (U, 1, 1, P)


class _LayerProducts(NamedTuple):
    """The products of one layer in sampling. Matrices with the same input are stacked into one product."""

    qkv: Function
    o: Function
    gate_up: Function
    down: Function


class _PackedWeights(NamedTuple):
    head: Function
    layers: list[_LayerProducts]


def _stacks(layer: Layer) -> tuple[tuple[Matrix, ...], ...]:
    """Return the matrices that each field of `_LayerProducts` stacks, in the order of the fields."""
    return (layer.q, layer.k, layer.v), (layer.o,), (layer.gate, layer.up), (layer.down,)


class LlamaSteps:
    """Decodes a batch token by token, without gradients.

    It holds packed copies of the weights, the keys and values of the prompts, and room for those of the whole response,
    which are written in place. Make it under `torch.no_grad()`.
    """

    def __init__(self, network: LlamaNetwork, encoded: Encoded, length: int, group_size: int) -> None:
        batch = len(encoded.mask) * group_size
        packed = network.packed()
        self._network = network
        self._head = packed.head
        self._products = [
            _LayerProducts(*map(with_lora, products, _stacks(layer)))
            for products, layer in zip(packed.layers, network.layers, strict=True)
        ]
        self._sizes = [len(matrix.weight) for matrix in _stacks(network.layers[0])[0]]  # Of q, k and v.

        # A CPU multiplies few rows of bfloat16 more slowly than float32.
        dtype = torch.float32 if encoded.mask.device.type == "cpu" else network.head.dtype
        read = network.read_prompts(encoded, dtype)
        self._first_states = read.states
        self._prompts = read.keys_values
        self._padding_bias = read.padding_bias
        self._first_positions = read.lengths.repeat_interleave(group_size)

        self._group_size = group_size
        # Each response's place among those of all prompts, `group_size` to a prompt.
        self._places = torch.arange(batch, device=encoded.mask.device)
        # Keys and values (2, B, H, T, d) of the responses' own tokens in each layer.
        heads = self._prompts[0][1].shape[1]
        sizes = (2, batch, heads, length, network.width)
        self._own = [read.states.new_empty(sizes, dtype=dtype) for _ in network.layers]
        self._done = 0  # Tokens read of each response.

    @torch.inference_mode()
    def next(self, tokens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, V) and hidden states (B, D) that predict the token after `tokens` (B,).

        At the first call `tokens` is None: the first token follows from the prompt alone.
        """
        network = self._network
        if tokens is None:
            logits = self._head(self._first_states).repeat_interleave(self._group_size, 0)
            return logits, self._first_states.repeat_interleave(self._group_size, 0)

        x = network.embed(tokens)
        turns = network.turns(x, self._first_positions + self._done)
        layers = zip(network.layers, self._products, self._own, self._prompts, strict=True)
        for layer, products, own, prompts in layers:
            n = network.normed(x, layer.attention_norm)
            q, k, v = network.heads(layer, products.qkv(n).split(self._sizes, -1), turns)
            self._append(own, k, v)
            x = x + products.o(self._attended(q, own, prompts).to(x.dtype))

            n = network.normed(x, layer.feed_forward_norm)
            gate, up = products.gate_up(n).chunk(2, -1)
            x = x + products.down(layer.activation(gate) * up)

        self._done += 1
        states = network.normed(x, network.norm)
        return self._head(states), states

    def _append(self, own: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the key and value (B, H, d) of the newest token behind those in `own` (2, B, H, T, d)."""
        own[0, :, :, self._done] = k
        own[1, :, :, self._done] = v

    def _attended(self, q: torch.Tensor, own: torch.Tensor, prompts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return attention (B, H * r * d) of the newest token's queries (B, H * r, d) to its prompt and response.

        Keys and values are (2, B, H, T, d) of the responses, (U, H, d, P) and (U, H, P, d) of the prompts.
        """
        keys, values = prompts
        own_keys, own_values = own[:, :, :, : self._done + 1]
        q = q.unflatten(1, (keys.shape[1], -1)).to(own.dtype)

        to_prompt = self._by_place(q) @ keys
        if self._padding_bias is not None:
            to_prompt = to_prompt + self._padding_bias
        to_own = q @ own_keys.transpose(-2, -1)

        weights = torch.cat((self._by_response(to_prompt), to_own), -1).softmax(-1)
        of_prompt, of_own = weights.split((keys.shape[-1], self._done + 1), -1)
        attended: torch.Tensor = self._by_response(self._by_place(of_prompt) @ values) + of_own @ own_values
        return attended.flatten(1)

    def _by_place(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (B, H, r, n) as (U, H, k * r, n): what answers one prompt is a part of one product.

        Some responses of a group may have ended. Their places stay, because all groups need the same size.
        """
        number = len(self._prompts[0][0])
        places = number * self._group_size
        if places > len(x):
            x = x.new_zeros(places, *x.shape[1:]).index_copy(0, self._places, x)
        by_prompt: torch.Tensor = x.unflatten(0, (number, self._group_size)).transpose(1, 2).flatten(2, 3)
        return by_prompt

    def _by_response(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (U, H, k * r, n) as (B, H, r, n)."""
        placed: torch.Tensor = x.unflatten(2, (self._group_size, -1)).transpose(1, 2).flatten(0, 1)
        return placed if len(placed) == len(self._places) else placed[self._places]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows of the batch but those that are True in `rows` (B,), and prompts without rows."""
        kept = rows.nonzero().squeeze(1)
        for number, own in enumerate(self._own):  # One layer after the other, which needs less memory.
            self._own[number] = own[:, kept]
        self._first_positions = self._first_positions[kept]

        self._places, prompts = closed_up(self._places[kept], self._group_size)
        if len(prompts) < len(self._prompts[0][0]):
            self._prompts = [(keys[prompts], values[prompts]) for keys, values in self._prompts]
            self._padding_bias = None if self._padding_bias is None else self._padding_bias[prompts]
