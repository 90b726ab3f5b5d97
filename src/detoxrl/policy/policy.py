"""How does a policy sample responses and give log-probs and values, whatever its architecture?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from detoxrl.policy.backbone import end_tokens
from detoxrl.policy.weights import POLICY, Weights
from detoxrl.records import Encoded, Responses


class Policy(ABC):
    """A text generator with a value head; its weights go by name, `adapter=None` is the start without any adapter.

    Dropout is off in every pass: the model stays in eval mode. Two architectures differ in `encode` and `_decode`.
    """

    def __init__(self, weights: Weights, tokenizer: PreTrainedTokenizerBase, train_encoder: bool) -> None:
        self.weights = weights
        self.tokenizer = tokenizer
        self.train_encoder = train_encoder
        self.model = weights.model.eval()
        width = self.model.get_output_embeddings().weight.shape[1]
        self.value_head = torch.nn.Linear(width, 1).to(device=self.model.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.pad: int = tokenizer.pad_token_id
        self.ends = end_tokens(self.model.config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.value_head.weight.device

    @property
    def reference(self) -> str | None:
        """Name of the frozen start's weights."""
        return self.weights.reference

    def to(self, device: torch.device) -> Policy:
        """Move model and value head to `device`."""
        self.weights.to(device)
        self.value_head.to(device)
        return self

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the model's weights that training may change."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Write the policy's weights as a folder that peft, or with full weights transformers, loads."""
        self.weights.save(folder)

    @abstractmethod
    def encode(self, prompts: Sequence[str], adapter: str | None = POLICY) -> Encoded:
        """Return what B prompts are to the decoder; unless the encoder trains, it serves all passes."""

    @abstractmethod
    def _decode(self, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, n, V) and hidden states (B, n, D) that predict the tokens after `tokens` (B, m).

        Before any token of the response n is m + 1: the first prediction follows from the prompt alone. Later calls
        on the same cache pass new tokens only, and n is m.
        """

    @abstractmethod
    def _new_cache(self) -> Any:
        """Return an empty cache for sampling."""

    def logprobs(
        self, encoded: Encoded, ids: torch.Tensor, temperature: float, adapter: str | None = POLICY
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probs of `ids` (nats), entropies (nats) and values, each (B, T), teacher-forced.

        The decoder is causal, so what stands after a response's last token changes nothing before it; no mask by
        `!= pad` is made (T5's start token is its pad).
        """
        with self.weights.using(adapter):
            logits, hidden = self._decode(encoded, ids[:, :-1], None)
        # (B, T, V) is the largest thing there is, so no copy of it is made without need.
        logits = logits.float() if temperature == 1 else logits.float() / temperature
        all_logprobs = logits.log_softmax(-1)
        chosen = all_logprobs.gather(-1, ids[..., None]).squeeze(-1)
        entropy = -all_logprobs.detach().exp().mul_(all_logprobs.detach()).sum(-1)
        return chosen, entropy, self._values(hidden.detach())

    def sample(
        self, encoded: Encoded, uniforms: torch.Tensor, temperature: float, adapter: str | None = POLICY
    ) -> Responses:
        """Return responses of up to T tokens, drawn by inverse CDF from `uniforms` (B, T) in [0, 1).

        Row i depends on uniforms[i] and its prompt alone. Rows that sampled EOS leave the batch. Call it under no_grad.
        """
        rows, length = uniforms.shape
        out = self._blank(rows, length)
        cache = self._new_cache()
        alive = torch.arange(rows, device=self.device)
        tokens, ends = out.ids[:, :0], torch.tensor(self.ends, device=self.device)
        with self.weights.using(adapter):
            for t in range(length):
                logits, hidden = self._decode(encoded, tokens, cache)
                logprobs = (logits[:, -1].float() / temperature).log_softmax(-1)
                tokens = draw(logprobs, uniforms[alive, t, None])
                out.ids[alive, t] = tokens.squeeze(1)
                out.response_mask[alive, t] = True
                out.logprobs[alive, t] = logprobs.gather(1, tokens).squeeze(1)
                out.values[alive, t] = self._values(hidden[:, -1])
                going = ~torch.isin(tokens.squeeze(1), ends)
                out.ended[alive] = ~going
                if not going.all():
                    alive, tokens = alive[going], tokens[going]
                    if len(alive) == 0:
                        break
                    # Not `select`: the cache holds the prompts at their full width.
                    encoded = replace(encoded, states=encoded.states[going], mask=encoded.mask[going])
                    cache.batch_select_indices(going.nonzero().squeeze(1))
        return out

    def decode(self, responses: Responses) -> list[str]:
        """Return the texts of the responses, special tokens left out."""
        return [text.strip() for text in self.tokenizer.batch_decode(responses.ids, skip_special_tokens=True)]

    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        # Scaled to unit root mean square, so that one value_lr suits every backbone (T5's states are large).
        hidden = torch.nn.functional.rms_norm(hidden.float(), hidden.shape[-1:])
        values: torch.Tensor = self.value_head(hidden)
        return values.squeeze(-1)

    def _blank(self, rows: int, length: int) -> Responses:
        zeros = torch.zeros(rows, length, device=self.device)
        ids = torch.full((rows, length), self.pad, device=self.device)
        ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        return Responses(ids=ids, response_mask=zeros.bool(), logprobs=zeros.clone(), values=zeros, ended=ended)


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return tokens (B, 1): the first whose cumulative probability exceeds uniforms (B, 1); logprobs is (B, V)."""
    cumulative = logprobs.exp().cumsum(-1)
    # The total is 1 only up to rounding; below 1 - 2^-23 a float32 product stays strictly below it.
    threshold = uniforms.clamp_max(1 - 2**-23).to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)
