"""How does an encoder-decoder policy encode prompts, sample responses and give log-probs?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from detoxrl.policy.backbone import tokenize
from detoxrl.records import Encoded, Responses

# peft's name for the adapter that `save_pretrained` writes to the top of a folder.
POLICY = "default"


class EncoderDecoderPolicy:
    """One base model, its adapters by name, and a value head.

    `adapter=None` in any method means the bare base. Dropout is off in every pass: the model stays in eval mode.
    """

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, reference: str | None, train_encoder: bool
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._base: Any = model.get_base_model()
        self._tuner: Any = model.base_model
        self.reference = reference
        self.train_encoder = train_encoder
        self.value_head = torch.nn.Linear(model.config.d_model, 1).to(device=model.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.pad: int = model.config.pad_token_id
        self.eos: int = model.config.eos_token_id
        self.start: int = model.config.decoder_start_token_id
        self._activate(POLICY)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.value_head.weight.device

    def to(self, device: torch.device) -> EncoderDecoderPolicy:
        """Move model and value head to `device`."""
        self.model.to(device)
        self.value_head.to(device)
        return self

    # Adapters

    def adapter_parameters(self) -> list[torch.nn.Parameter]:
        """Return the policy adapter's parameters that training may change."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load the LoRA in `folder` beside the others, frozen."""
        self.model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        self._activate(POLICY)

    def save_adapter(self, folder: Path) -> None:
        """Write the policy adapter as a folder that peft loads on the base."""
        self.model.save_pretrained(str(folder), selected_adapters=[POLICY])

    def save(self, folder: Path) -> None:
        """Write the policy adapter, and the value head beside it."""
        self.save_adapter(folder)
        save_file(self.value_head.state_dict(), folder / "value_head.safetensors")

    def load(self, folder: Path) -> None:
        """Put the adapter and the value head that `save` wrote in place of the present ones."""
        set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"), adapter_name=POLICY)
        self.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))

    def _activate(self, name: str) -> None:
        # peft thaws whatever adapter it makes active; only the policy's may train, and its encoder part only if asked.
        self._tuner.set_adapter(name, inference_mode=name != POLICY)
        if name == POLICY and not self.train_encoder:
            for path, parameter in self.model.named_parameters():
                if ".encoder." in path:
                    parameter.requires_grad_(False)

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        if adapter == POLICY:
            yield
            return
        try:
            if adapter is None:
                with self.model.disable_adapter():
                    yield
            else:
                self._activate(adapter)
                yield
        finally:
            self._activate(POLICY)

    # Passes

    def encode(self, prompts: Sequence[str], adapter: str | None = POLICY) -> Encoded:
        """Return the encoder states of B prompts; with a frozen encoder they carry no gradient and serve all passes."""
        batch = tokenize(self.tokenizer, prompts, self.device)
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()), self._using(adapter):
            states = self._base.get_encoder()(**batch).last_hidden_state
        return Encoded(states=states, mask=batch["attention_mask"])

    def logprobs(
        self, encoded: Encoded, ids: torch.Tensor, temperature: float, adapter: str | None = POLICY
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probs of `ids` (nats), entropies (nats) and values, each (B, T), teacher-forced.

        The decoder is causal, so what stands after a response's last token changes nothing before it; no mask by
        `!= pad` is made (T5's start token is its pad).
        """
        start = torch.full_like(ids[:, :1], self.start)
        with self._using(adapter):
            logits, hidden = self._decode(encoded, torch.cat([start, ids[:, :-1]], 1), None)
        all_logprobs = (logits.float() / temperature).log_softmax(-1)
        chosen = all_logprobs.gather(-1, ids[..., None]).squeeze(-1)
        entropy = -(all_logprobs.detach().exp() * all_logprobs.detach()).sum(-1)
        return chosen, entropy, self._values(hidden.detach())

    @torch.no_grad()
    def sample(
        self, encoded: Encoded, uniforms: torch.Tensor, temperature: float, adapter: str | None = POLICY
    ) -> Responses:
        """Return responses of up to T tokens, drawn by inverse CDF from `uniforms` (B, T) in [0, 1).

        Row i depends on uniforms[i] and its prompt alone. Rows that sampled EOS leave the batch.
        """
        rows, length = uniforms.shape
        out = self._blank(rows, length)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        alive = torch.arange(rows, device=self.device)
        tokens = torch.full((rows, 1), self.start, device=self.device)
        with self._using(adapter):
            for t in range(length):
                logits, hidden = self._decode(encoded, tokens, cache)
                logprobs = (logits[:, -1].float() / temperature).log_softmax(-1)
                tokens = draw(logprobs, uniforms[alive, t, None])
                out.ids[alive, t] = tokens.squeeze(1)
                out.response_mask[alive, t] = True
                out.logprobs[alive, t] = logprobs.gather(1, tokens).squeeze(1)
                out.values[alive, t] = self._values(hidden[:, -1])
                going = tokens.squeeze(1) != self.eos
                out.ended[alive] = ~going
                if not going.all():
                    alive, tokens = alive[going], tokens[going]
                    if len(alive) == 0:
                        break
                    encoded = Encoded(states=encoded.states[going], mask=encoded.mask[going])
                    cache.batch_select_indices(going.nonzero().squeeze(1))
        return out

    def decode(self, responses: Responses) -> list[str]:
        """Return the texts of the responses, special tokens left out."""
        kept = [ids[mask].tolist() for ids, mask in zip(responses.ids, responses.response_mask, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(kept, skip_special_tokens=True)]

    def _decode(self, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = self._base(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
            attention_mask=encoded.mask,
            decoder_input_ids=tokens,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        return out.logits, out.decoder_hidden_states[-1]

    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        # Scaled to unit root mean square, so that one value_lr suits every backbone (T5's states are large).
        hidden = torch.nn.functional.rms_norm(hidden.float(), hidden.shape[-1:])
        values: torch.Tensor = self.value_head(hidden)
        return values.squeeze(-1)

    def _blank(self, rows: int, length: int) -> Responses:
        zeros = torch.zeros(rows, length, device=self.device)
        return Responses(
            ids=torch.full((rows, length), self.pad, device=self.device),
            response_mask=zeros.bool(),
            logprobs=zeros.clone(),
            values=zeros.clone(),
            ended=torch.zeros(rows, dtype=torch.bool, device=self.device),
        )


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return tokens (B, 1): the first whose cumulative probability exceeds uniforms (B, 1); logprobs is (B, V)."""
    cumulative = logprobs.exp().cumsum(-1)
    # The total is 1 only up to rounding; below 1 - 2^-23 a float32 product stays strictly below it.
    threshold = uniforms.clamp_max(1 - 2**-23).to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)
