"""How does an encoder-decoder read prompts and predict responses?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from detoxrl.policy.backbone import tokenize
from detoxrl.policy.policy import Policy
from detoxrl.policy.weights import POLICY
from detoxrl.records import Encoded


class EncoderDecoderPolicy(Policy):
    """T5, BART and their like. A frozen encoder reads each prompt once for sampling, reference and every epoch."""

    def encode(self, prompts: Sequence[str], adapter: str | None = POLICY) -> Encoded:
        """Return the encoder states of B prompts; those of a frozen encoder carry no gradient."""
        batch = tokenize(self.tokenizer, prompts, "right", self.device)
        with self.weights.using(adapter):
            states = self.weights.active.get_encoder()(**batch).last_hidden_state
        return Encoded(states=states, mask=batch["attention_mask"])

    def _decode(self, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if cache is None or cache.get_seq_length() == 0:
            start = tokens.new_full((len(tokens), 1), self.model.config.decoder_start_token_id)
            tokens = torch.cat([start, tokens], 1)
        out = self.weights.active(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
            attention_mask=encoded.mask,
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        return out.logits, out.decoder_hidden_states[-1]

    def _new_cache(self) -> EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
