"""How does a policy read prompts, sample responses and give log-probs and values, whatever its architecture?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from detoxrl.policy.backbone import end_tokens
from detoxrl.policy.weights import POLICY, Weights
from detoxrl.records import Encoded, Responses


class Policy:
    """A text generator with a value head; its weights go by name, `adapter=None` is the start without any adapter.

    Dropout is off in every pass: the model stays in eval mode. Where there is an encoder (T5, BART), it reads each
    prompt once for sampling, reference and every epoch, unless it trains. In a causal model (GPT-2, Llama) every layer
    that reads the prompt may train, so what is shared of it is its token ids.
    """

    def __init__(self, weights: Weights, tokenizer: PreTrainedTokenizerBase, train_encoder: bool) -> None:
        self.weights = weights
        self.reference: str | None = weights.reference
        """Name of the frozen start's weights."""
        self.save = weights.save
        """Writes the policy's weights as a folder that peft, or with full weights transformers, loads."""
        self.tokenizer = tokenizer
        self.train_encoder = train_encoder
        self.model = weights.model.eval()
        self.has_encoder: bool = self.model.config.is_encoder_decoder
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

    def to(self, device: torch.device) -> Self:
        """Move model and value head to `device`."""
        for model in (*self.weights.models.values(), self.value_head):
            model.to(device)
        return self

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the model's weights that training may change."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def encode(self, prompts: Sequence[str], adapter: str | None = POLICY) -> Encoded:
        """Return what B prompts are to the decoder; unless the encoder trains, it serves all passes, without gradient.

        A causal model's are padded on the left, so that a response follows its prompt without a gap.
        """
        side = "right" if self.has_encoder else "left"
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side=side).to(self.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if not self.has_encoder:
            return Encoded(states=ids, mask=mask)
        with self.weights.using(adapter):
            states = self.weights.active.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return Encoded(states=states, mask=mask)

    def _decode(self, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, n, V) and hidden states (B, n, D) that predict the tokens after `tokens` (B, m).

        Before any token of the response n is m + 1: the first prediction follows from the prompt alone. Later calls
        on the same cache pass new tokens only, and n is m.
        """
        seen = 0 if cache is None else cache.get_seq_length()
        new = tokens.shape[1]
        if seen == 0:
            opening = encoded.states
            if self.has_encoder:
                opening = tokens.new_full((len(tokens), 1), self.model.config.decoder_start_token_id)
            new, tokens = new + 1, torch.cat([opening, tokens], 1)
        settings = {"past_key_values": cache, "use_cache": cache is not None, "output_hidden_states": True}
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
        zeros = torch.zeros_like(uniforms)
        ids = torch.full_like(zeros, self.pad, dtype=torch.long)
        out = Responses(ids=ids, response_mask=zeros.bool(), logprobs=zeros.clone(), values=zeros, ended=zeros.any(1))
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if self.has_encoder else DynamicCache()
        alive = torch.arange(len(ids), device=self.device)
        tokens, ends = ids[:, :0], torch.tensor(self.ends, device=self.device)
        with self.weights.using(adapter):
            for t in range(uniforms.shape[1]):
                logits, hidden = self._decode(encoded, tokens, cache)
                logprobs = (logits[:, -1].float() / temperature).log_softmax(-1)
                tokens = draw(logprobs, uniforms[alive, t, None])
                ids[alive, t] = tokens.squeeze(1)
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


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return tokens (B, 1): the first whose cumulative probability exceeds uniforms (B, 1); logprobs is (B, V)."""
    cumulative = logprobs.exp().cumsum(-1)
    # The total is 1 only up to rounding; below 1 - 2^-23 a float32 product stays strictly below it.
    threshold = uniforms.clamp_max(1 - 2**-23).to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)
