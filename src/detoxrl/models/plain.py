"""How does any model of transformers' read and write, by its own forward pass?"""

from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from detoxrl.models.linear import FastLinear
from detoxrl.models.token_logprobs import LOGITS, select_tokens
from detoxrl.models.types import Encoded
from detoxrl.models.weights import Weights


class PlainNetwork:
    """A model under the weights of one name, as `Policy` wants it, whatever the architecture."""

    def __init__(self, weights: Weights, adapter: str | None) -> None:
        self.weights, self.adapter = weights, adapter
        self.has_encoder: bool = weights.model.config.is_encoder_decoder

    @staticmethod
    def most_tokens(config: Any) -> int:
        """Return how many tokens of responses one pass without a gradient reads: their logits are all kept."""
        return 3 * LOGITS // int(config.get_text_config().vocab_size)

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the encoder's states (B, P, D) for prompts of tokens ids (B, P)."""
        with self.weights.using(self.adapter), FastLinear():
            states: torch.Tensor = self.weights.active.get_encoder()(input_ids=ids, attention_mask=mask)[0]
            return states

    def shared(self, encoded: Encoded) -> Encoded:
        """Return the prompts as they are: what a layer makes of them is the model's own business."""
        return encoded

    def predicted(self, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, n, V) and hidden states (B, n, D) that predict the tokens after `tokens` (B, m).

        Before any token of the response n is m + 1: the first prediction follows from the prompt alone. Later calls
        on the same cache pass new tokens only, and n is m.
        """
        seen = 0 if cache is None else cache.get_seq_length()
        new = tokens.shape[1]
        if seen == 0:
            opening = encoded.states
            if self.has_encoder:
                opening = tokens.new_full((len(tokens), 1), self.weights.model.config.decoder_start_token_id)
            new, tokens = new + 1, torch.cat([opening, tokens], 1)
        settings = {"past_key_values": cache, "use_cache": cache is not None, "output_hidden_states": True}
        with self.weights.using(self.adapter), FastLinear():
            if self.has_encoder:
                read = BaseModelOutput(last_hidden_state=encoded.states)
                out = self.weights.active(
                    encoder_outputs=read, attention_mask=encoded.mask, decoder_input_ids=tokens, **settings
                )
                return out.logits, out.decoder_hidden_states[-1]
            answered = seen + tokens.shape[1] - encoded.states.shape[1]
            mask = torch.cat([encoded.mask, tokens.new_ones(len(tokens), answered)], 1)
            # Positions count real tokens: counted by column, padding would shift what learned positions say.
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, seen:]
            out = self.weights.active(
                input_ids=tokens, attention_mask=mask, position_ids=positions, logits_to_keep=new, **settings
            )
            return out.logits[:, -new:], out.hidden_states[-1][:, -new:]

    def logprobs(
        self, encoded: Encoded, ids: torch.Tensor, mask: torch.Tensor | None, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probs and entropies (N,) of the N tokens of ids (B, T) under the mask, and states (N, D).

        Without a mask all count.
        """
        logits, hidden = self.predicted(encoded, ids[:, :-1], None)
        # Logits are the largest thing there is, so no copy of them is made without need.
        logits = select_tokens(logits, mask).float()
        logits = logits if temperature == 1 else logits / temperature
        every = logits.log_softmax(-1)
        entropy = -every.detach().exp().mul_(every.detach()).sum(-1)
        return every.gather(-1, select_tokens(ids, mask)[:, None]).squeeze(1), entropy, select_tokens(hidden, mask)

    def steps(self, encoded: Encoded, length: int) -> "PlainSteps":
        """Return what samples tokens after the prompts, one at a time."""
        return PlainSteps(self, encoded)


class PlainSteps:
    """Decodes a batch token by token, on the model's own cache."""

    def __init__(self, decoder: PlainNetwork, encoded: Encoded) -> None:
        self.decoder, self.encoded = decoder, encoded
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if decoder.has_encoder else DynamicCache()

    def next(self, tokens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, V) and states (B, D) that predict what follows `tokens` (B,); None: what comes first."""
        batch = self.encoded.mask.new_empty(len(self.encoded.mask), 0) if tokens is None else tokens[:, None]
        logits, hidden = self.decoder.predicted(self.encoded, batch, self._cache)
        return logits[:, -1], hidden[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        """Leave out all rows but those of a bool tensor."""
        # Not `select`: the cache holds the prompts at their full width.
        self.encoded = replace(self.encoded, states=self.encoded.states[rows], mask=self.encoded.mask[rows])
        self._cache.batch_select_indices(rows.nonzero().squeeze(1))
