"""How does a model of any architecture read and write, by its own forward pass in transformers?"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from detoxrl.models.ends import start_token_ids
from detoxrl.models.linear import FastLinear
from detoxrl.models.prefix import growing_prefix, kept_prefix, new_prefix, release
from detoxrl.models.recompute import recomputing_layers
from detoxrl.models.token_logprobs import MAX_LOGITS, entropies_of, place_tokens, select_tokens
from detoxrl.models.types import Encoded
from detoxrl.models.weights import Weights


class PlainNetwork:
    """A model under the weights of one name, with the methods that `Policy` calls, for every architecture.

    `T5Network` and `LlamaNetwork` have the same methods and are faster, but each knows one family only.
    """

    def __init__(self, weights: Weights, adapter: str | None, checkpointing: bool = False) -> None:
        self.weights = weights
        self.adapter = adapter
        self.checkpointing = checkpointing
        self.has_encoder: bool = weights.model.config.is_encoder_decoder

    @staticmethod
    def max_tokens_per_pass(config: Any) -> int:
        """Return how many response tokens a pass without gradients should read: it holds the logits of all of them."""
        return 3 * MAX_LOGITS // int(config.get_text_config().vocab_size)

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the encoder's hidden states (B, P, D) for prompts of token ids (B, P)."""
        with self.weights.using(self.adapter), self._recomputing(), FastLinear():
            states: torch.Tensor = self.weights.active.get_encoder()(input_ids=ids, attention_mask=mask)[0]
            return states

    def with_shared_cross(self, encoded: Encoded) -> Encoded:
        """Return the prompts unchanged: keys and values are computed inside the model's own layers."""
        return encoded

    def predicted(self, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, n, V) and hidden states (B, n, D) that predict the tokens after `tokens` (B, m).

        Without a cache, or at the first call with one, n is m + 1: the first prediction follows from the prompt alone.
        Later calls with the same cache pass only the new tokens, and n is m.
        """
        seen = 0 if cache is None else cache.get_seq_length()

        with self.weights.using(self.adapter), self._recomputing(), FastLinear():
            if self.has_encoder:
                return self._predicted_by_decoder(encoded, tokens, seen, cache)
            return self._predicted_by_causal_model(encoded, tokens, seen, cache)

    def _recomputing(self) -> AbstractContextManager[None]:
        """Have backward passes recompute the layers that are computed inside the block, if that is asked for."""
        return recomputing_layers(self.weights.active, FastLinear) if self.checkpointing else nullcontext()

    def _predicted_by_decoder(
        self, encoded: Encoded, tokens: torch.Tensor, seen: int, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        predictions = tokens.shape[1]
        if seen == 0:
            predictions += 1
            start = tokens.new_tensor(start_token_ids(self.weights.active))
            tokens = torch.cat([start.expand(len(tokens), -1), tokens], 1)

        out = self.weights.active(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
            attention_mask=encoded.mask,
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        return out.logits[:, -predictions:], out.decoder_hidden_states[-1][:, -predictions:]

    def _predicted_by_causal_model(
        self, encoded: Encoded, tokens: torch.Tensor, seen: int, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        predictions = tokens.shape[1]
        if seen == 0:
            predictions += 1
            tokens = torch.cat([encoded.states, tokens], 1)

        response_length = seen + tokens.shape[1] - encoded.states.shape[1]
        mask = torch.cat([encoded.mask, tokens.new_ones(len(tokens), response_length)], 1)
        # Positions count the tokens that the mask shows. Counted by column, the padding on the left would shift them.
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, seen:]

        out = self.weights.active(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=predictions,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        return out.logits[:, -predictions:], out.hidden_states[-1][:, -predictions:]

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
        group_size = len(ids) // len(encoded.mask)
        if group_size > 1 and not self.has_encoder:
            return self._logprobs_of_groups(encoded, ids, mask, temperature, entropy_gradient)

        # An encoder has read each prompt once. A group of 1 needs no copies.
        repeated = encoded.repeated(group_size) if group_size > 1 else encoded
        logits, states = self.predicted(repeated, ids[:, :-1], None)
        chosen, entropy = _scored(logits, ids, mask, temperature, entropy_gradient)
        return chosen, entropy, select_tokens(states, mask)

    def _logprobs_of_groups(
        self, encoded: Encoded, ids: torch.Tensor, mask: torch.Tensor | None, temperature: float, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what `logprobs` returns, by a causal model that reads each prompt once for the rows that answer it.

        Gradients flow through what was read. The first token of a response follows from the prompt alone.
        """
        group_size = len(ids) // len(encoded.mask)
        prefix = new_prefix()
        try:
            no_tokens = ids.new_empty(len(encoded.mask), 0)
            logits, states = self.predicted(encoded, no_tokens, prefix)
            first_logits = logits.repeat_interleave(group_size, 0)
            first = (first_logits, states.repeat_interleave(group_size, 0))
            parts = [(slice(0, 1), first)]
            if ids.shape[1] > 1:
                kept = kept_prefix(prefix, group_size)
                parts.append((slice(1, None), self.predicted(encoded.repeated(group_size), ids[:, :-1], kept)))
        finally:
            release(prefix)

        # The logits are the largest tensors of the pass, so the two parts are joined behind them.
        by_token = []
        for columns, (logits, states) in parts:
            part_ids = ids[:, columns]
            part_mask = None if mask is None else mask[:, columns]
            chosen, entropy = _scored(logits, part_ids, part_mask, temperature, entropy_gradient)
            placed = (place_tokens(chosen, part_ids, part_mask), place_tokens(entropy, part_ids, part_mask), states)
            by_token.append(placed)
        chosen, entropy, states = (torch.cat(halves, 1) for halves in zip(*by_token, strict=True))
        return select_tokens(chosen, mask), select_tokens(entropy, mask), select_tokens(states, mask)

    def steps(self, encoded: Encoded, length: int, group_size: int) -> "PlainSteps":
        """Return an object that decodes responses to the prompts token by token, `length` at most."""
        return PlainSteps(self, encoded, length, group_size)


def _scored(
    logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None, temperature: float, entropy_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies (N,) of the N tokens of ids (B, T) under the mask, from logits (B, T, V)."""
    # Copied only where necessary.
    logits = select_tokens(logits, mask).float()
    logits = logits if temperature == 1 else logits / temperature
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, select_tokens(ids, mask)[:, None]).squeeze(1)
    return chosen, entropies_of(logprobs, entropy_gradient)


class PlainSteps:
    """Decodes a batch token by token. What was read stays in the cache of transformers, or in one of ours."""

    def __init__(self, network: PlainNetwork, encoded: Encoded, length: int, group_size: int) -> None:
        self.network = network
        self.encoded = encoded
        self.length = length
        self.group_size = group_size
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if network.has_encoder else new_prefix()

    def next(self, tokens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, V) and hidden states (B, D) that predict the token after `tokens` (B,).

        At the first call `tokens` is None: the first token follows from the prompt alone.
        """
        if tokens is None:
            return self._read_prompts()

        logits, states = self.network.predicted(self.encoded, tokens[:, None], self._cache)
        return logits[:, -1], states[:, -1]

    def _read_prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read each prompt once, and return what predicts the first tokens of its responses."""
        mask = self.encoded.mask
        logits, states = self.network.predicted(self.encoded, mask.new_empty(len(mask), 0), self._cache)
        logits = logits[:, -1]
        states = states[:, -1]
        if not self.network.has_encoder:
            self._cache = growing_prefix(self._cache, self.group_size, self.length)
        elif self.group_size > 1:
            self._cache.batch_repeat_interleave(self.group_size)
        if self.group_size > 1:
            self.encoded = self.encoded.repeated(self.group_size)
            logits = logits.repeat_interleave(self.group_size, 0)
            states = states.repeat_interleave(self.group_size, 0)
        return logits, states

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows of the batch but those that are True in `rows` (B,)."""
        # `Encoded.select` would also drop columns of padding, but the cache has all columns of the prompts.
        self.encoded = replace(self.encoded, states=self.encoded.states[rows], mask=self.encoded.mask[rows])
        self._cache.batch_select_indices(rows.nonzero().squeeze(1))
