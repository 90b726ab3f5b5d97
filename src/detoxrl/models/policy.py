"""How does a policy read prompts, sample responses and give log-probs and values, whatever its architecture?"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedTokenizerBase

from detoxrl.models.loading import eos_token_ids
from detoxrl.models.plain import PlainNetwork
from detoxrl.models.t5 import T5Network, fits
from detoxrl.models.types import Encoded, Responses
from detoxrl.models.weights import POLICY, LoraWeights, Weights

# Most tokens, padding among them, that a CPU's encoder reads at once: more is no faster there, and wastes padding.
_READ = 1024
# Share of a batch at which the rows that ended leave it.
_LEAVE = 0.75


class Policy:
    """A text generator with a value head; its weights go by name, `adapter=None` is the start without any adapter.

    Dropout is off in every pass: the model stays in eval mode. Where there is an encoder (T5, BART), it reads each
    prompt once for sampling, reference and every epoch, unless it trains. In a causal model (GPT-2, Llama) every layer
    that reads the prompt may train, so what is shared of it is its token ids.
    """

    def __init__(self, weights: Weights, tokenizer: PreTrainedTokenizerBase, train_encoder: bool) -> None:
        self.weights = weights
        self.reference: str | None = weights.reference  # Name of the frozen start's weights.
        self.save = weights.save  # Writes the policy's weights as a folder that peft, or if full transformers, loads.
        self.tokenizer = tokenizer
        self.train_encoder = train_encoder
        self.model = weights.model.eval()
        self._network = self._fitting()
        self.has_encoder: bool = self.model.config.is_encoder_decoder
        width = self.model.get_output_embeddings().weight.shape[1]
        self.value_head = torch.nn.Linear(width, 1).to(device=self.model.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.pad: int = tokenizer.pad_token_id
        self.ends = eos_token_ids(self.model.config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.value_head.weight.device

    def to(self, device: torch.device) -> Self:
        """Move models and value head to `device`."""
        self.value_head.to(device)
        for model in self.weights.models.values():
            model.to(device)
        if isinstance(self.weights, LoraWeights):
            self.weights.packs.clear()
        return self

    def add(self, name: str, folder: Path) -> None:
        """Load the weights in `folder` beside the others, frozen. Raises InputError and StorageError."""
        self.weights.add(name, folder)
        self._network = self._fitting()

    def _fitting(self) -> type[T5Network] | type[PlainNetwork]:
        return T5Network if fits(self.weights) else PlainNetwork

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the model's weights that training may change."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def encode(self, prompts: Sequence[str], adapter: str | None = POLICY) -> Encoded:
        """Return what B prompts are to the decoder; unless the encoder trains, it serves all passes, without gradient.

        The encoder reads a few at a time, which pads least when they come sorted by length. A causal model's prompts
        are padded on the left, so that a response follows its prompt without a gap.
        """
        side = "right" if self.has_encoder else "left"
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side=side)
        lengths: list[int] = batch["attention_mask"].sum(1).tolist()
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        if not self.has_encoder:
            return Encoded(states=ids, mask=mask)
        states, network = [], self._network(self.weights, adapter)
        most = _READ if self.device.type == "cpu" else 32 * _READ
        for rows in length_batches(lengths, most):
            width = max(lengths[rows])
            read = network.read(ids[rows, :width], mask[rows, :width])
            states.append(torch.nn.functional.pad(read, (0, 0, 0, ids.shape[1] - width)))
        return Encoded(states=torch.cat(states), mask=mask)

    def shared(self, encoded: Encoded) -> Encoded:
        """Return the prompts with all that sampling, reference and update would each compute of them alike.

        These are keys and values of cross-attention, where neither the encoder nor the weights below a LoRA train.
        """
        alike = isinstance(self.weights, LoraWeights) and not self.train_encoder
        return self._network(self.weights, None).shared(encoded) if alike else encoded

    def logprobs(
        self,
        encoded: Encoded,
        ids: torch.Tensor,
        temperature: float,
        adapter: str | None = POLICY,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probs of `ids` (nats), entropies (nats) and values, each (B, T), teacher-forced.

        Outside `mask` (B, T), if there is one, they are 0, and no logits are made. The decoder is causal, so what
        stands after a response's last token changes nothing before it; no mask by `!= pad` is made (T5's start token is
        its pad).
        """
        chosen, entropy, states = self._network(self.weights, adapter).logprobs(encoded, ids, mask, temperature)
        found, nothing = (chosen, entropy, self._values(states.detach())), torch.zeros(ids.shape, device=ids.device)
        logprobs, entropies, values = (
            one.view(ids.shape) if mask is None else nothing.masked_scatter(mask, one) for one in found
        )
        return logprobs, entropies, values

    def rows_at_once(self, length: int) -> int:
        """Return how many responses of `length` tokens one pass without a gradient reads well."""
        return max(1, self._network.most_tokens(self.model.config) // length)

    @torch.no_grad()
    def sample(
        self, encoded: Encoded, uniforms: torch.Tensor, temperature: float, adapter: str | None = POLICY
    ) -> Responses:
        """Return responses of up to T tokens, drawn by inverse CDF from `uniforms` (B, T) in [0, 1).

        Row i depends on uniforms[i] and its prompt alone. Rows that sampled EOS leave the batch, several at once.
        """
        zeros = torch.zeros_like(uniforms)
        ids = torch.full_like(zeros, self.pad, dtype=torch.long)
        out = Responses(ids=ids, response_mask=zeros.bool(), logprobs=zeros.clone(), values=zeros, ended=zeros.any(1))
        rows = torch.arange(len(ids), device=self.device)  # those that are still in the batch, some of them ended
        steps, ends = self._network(self.weights, adapter).steps(encoded, ids.shape[1]), torch.tensor(self.ends)
        tokens, ends = None, ends.to(self.device)
        for t in range(ids.shape[1]):
            logits, states = steps.next(tokens)
            logprobs = (logits.float() / temperature).log_softmax(-1)
            tokens = draw_tokens(logprobs, uniforms[rows, t, None])
            counts, chosen, tokens = ~out.ended[rows], logprobs.gather(1, tokens).squeeze(1), tokens.squeeze(1)
            out.ids[rows, t] = torch.where(counts, tokens, self.pad)
            out.response_mask[rows, t] = counts
            out.logprobs[rows, t] = torch.where(counts, chosen, 0.0)
            out.values[rows, t] = torch.where(counts, self._values(states), 0.0)
            out.ended[rows] |= torch.isin(tokens, ends)
            going = ~out.ended[rows]
            if bool(going.all()):
                continue
            left = int(going.sum())
            if left == 0:
                break
            if left <= _LEAVE * len(rows):  # each leaving copies keys and values
                rows, tokens = rows[going], tokens[going]
                steps.keep(going)
        return out

    def decode(self, responses: Responses) -> list[str]:
        """Return the texts of the responses, special tokens left out."""
        return [text.strip() for text in self.tokenizer.batch_decode(responses.ids, skip_special_tokens=True)]

    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        # Scaled to unit root mean square, so that one value_lr suits every backbone (T5's states are large).
        hidden = torch.nn.functional.rms_norm(hidden.float(), hidden.shape[-1:])
        values: torch.Tensor = self.value_head(hidden)
        return values.squeeze(-1)


def length_batches(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    """Yield consecutive rows that have at most `tokens` tokens when padded to the longest, or one row."""
    start, longest = 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > start and longest * (row + 1 - start) > tokens:
            yield slice(start, row)
            start, longest = row, length
    yield slice(start, len(lengths))


def draw_tokens(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return tokens (B, 1): the first whose cumulative probability exceeds uniforms (B, 1); logprobs is (B, V)."""
    cumulative = logprobs.exp().cumsum(-1)
    # The total is 1 only up to rounding; below 1 - 2^-23 a float32 product stays strictly below it.
    threshold = uniforms.clamp_max(1 - 2**-23).to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)
