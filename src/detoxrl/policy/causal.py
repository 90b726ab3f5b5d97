"""How does a causal model read prompts and predict responses?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from detoxrl.policy.backbone import tokenize
from detoxrl.policy.policy import Policy
from detoxrl.policy.weights import POLICY
from detoxrl.records import Encoded


class CausalPolicy(Policy):
    """GPT-2, Llama and their like. What is shared of a prompt is its token ids: every layer that reads it may train."""

    def encode(self, prompts: Sequence[str], adapter: str | None = POLICY) -> Encoded:
        """Return the token ids of B prompts, left-padded, so that a response follows its prompt without a gap."""
        batch = tokenize(self.tokenizer, prompts, "left", self.device)
        return Encoded(states=batch["input_ids"], mask=batch["attention_mask"])

    def _decode(self, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen = 0 if cache is None else cache.get_seq_length()
        new, ids = tokens.shape[1], tokens
        if seen == 0:
            new, ids = new + 1, torch.cat([encoded.states, tokens], 1)
        answered = seen + ids.shape[1] - encoded.states.shape[1]
        mask = torch.cat([encoded.mask, tokens.new_ones(len(tokens), answered)], 1)
        # Positions count real tokens: counted by column, padding would shift what learned positions say.
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.weights.active(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions[:, seen:],
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
            logits_to_keep=new,
        )
        return out.logits[:, -new:], out.hidden_states[-1][:, -new:]

    def _new_cache(self) -> DynamicCache:
        return DynamicCache()
