"""How does a policy read prompts, sample responses, and give log-probs and values, whatever its architecture?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import torch
from transformers import PreTrainedTokenizerBase

from detoxrl.config.schema import DataConfig
from detoxrl.models.chat import uses_chat_template
from detoxrl.models.ends import end_token_ids
from detoxrl.models.llama import LlamaNetwork, is_plain_llama
from detoxrl.models.plain import PlainNetwork
from detoxrl.models.t5 import T5Network, is_plain_t5
from detoxrl.models.token_logprobs import place_tokens
from detoxrl.models.types import Encoded, Responses
from detoxrl.models.weights import POLICY, LoraWeights, Weights

Network = T5Network | LlamaNetwork | PlainNetwork

# Maximum number of tokens, padding included, that an encoder reads at once on a CPU: larger batches are no faster there
# and waste more on padding. A GPU reads 32 times as many.
_ENCODER_TOKENS = 1024
# After how many tokens sampling asks which rows have ended. On a CPU that costs nothing; a GPU has to finish all that
# was queued before it can answer.
_ASK_EVERY = {"cpu": 1}
_ASK_GPU_EVERY = 16
# Finished rows leave the sampling batch once at most this share of its rows is unfinished.
_SHRINK_AT = 0.75
# A nucleus rarely has more tokens; finding these takes a fraction of the time of sorting a vocabulary.
_NUCLEUS_GUESS = 1024


class Scored(NamedTuple):
    """What a teacher-forced pass says of the tokens of responses."""

    logprobs: torch.Tensor  # (B, T) nats.
    entropy: torch.Tensor  # (B, T) nats, of the distribution that each token was drawn from.
    values: torch.Tensor | None  # (B, T) of the value head; None without one.


class Policy:
    """A text generator, and the value head that an algorithm with a critic adds.

    Its weights have names: `adapter=POLICY` is what trains, `policy.reference` the frozen start, and None the start
    without any adapter. Dropout is off in every pass, because the model stays in eval mode.

    An encoder-decoder (T5, BART) reads each prompt once for sampling, the reference and every epoch, unless its encoder
    trains. In a causal model (GPT-2, Llama) every layer that reads the prompt may train, so passes share only the token
    ids of the prompt; within a pass, the responses to a prompt share its keys and values.
    """

    def __init__(
        self, weights: Weights, tokenizer: PreTrainedTokenizerBase, train_encoder: bool, checkpointing: bool = False
    ) -> None:
        self.weights = weights
        self.checkpointing = checkpointing  # Whether backward passes recompute activations.
        self.reference: str | None = weights.reference
        self.tokenizer = tokenizer
        self.train_encoder = train_encoder
        # Whether a prompt lacks the special tokens of the tokenizer. A chat template has written them.
        self.adds_special_tokens = True
        self.model = weights.model.eval()
        self._network_class = _network_class(weights)
        self.has_encoder: bool = self.model.config.is_encoder_decoder
        self.pad_token_id: int = tokenizer.pad_token_id
        self.eos_token_ids = end_token_ids(weights.active, tokenizer)
        self.value_head: torch.nn.Linear | None = None

    def add_value_head(self) -> torch.nn.Linear:
        """Return the value head; a policy without one gets one, zero at first. From now on passes compute values."""
        if self.value_head is not None:
            return self.value_head

        width = self.model.get_output_embeddings().weight.shape[1]
        head = torch.nn.Linear(width, 1).to(device=self.device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        self.value_head = head
        return head

    @property
    def has_fast_network(self) -> bool:
        """Whether the model is written out here, with packed weights for sampling."""
        return self._network_class is not PlainNetwork

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.model.device
        return device

    def to(self, device: torch.device) -> Self:
        """Move the weights of every name and the value head, if there is one, to `device`."""
        if self.value_head is not None:
            self.value_head.to(device)
        for model in self.weights.models.values():
            model.to(device)
        self.weights.forget_packed()
        return self

    def add(self, name: str, folder: Path) -> None:
        """Load the weights in `folder` under a name, frozen. Raises InputError and StorageError."""
        self.weights.add(name, folder)
        self._network_class = _network_class(self.weights)

    def save(self, folder: Path) -> None:
        """Write the policy's weights as a folder that peft loads, or transformers if they are full weights."""
        self.weights.save(folder)

    def for_prompts_of(self, config: DataConfig) -> Self:
        """Return this policy, set to read prompts as the config makes them for its tokenizer."""
        self.adds_special_tokens = not uses_chat_template(config, self.tokenizer)
        return self

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the model's weights that training may change; the value head's are apart."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def encode(self, prompts: Sequence[str], adapter: str | None = POLICY) -> Encoded:
        """Return B prompts in the form the decoder reads.

        Unless the encoder trains, the result serves all passes and has no gradient. The encoder reads a few prompts at
        a time, which wastes least on padding when they come sorted by length. The prompts of a causal model are padded
        on the left, so that each response follows its prompt without a gap.
        """
        side = "right" if self.has_encoder else "left"
        batch = self.tokenizer(
            list(prompts),
            return_tensors="pt",
            padding=True,
            padding_side=side,
            add_special_tokens=self.adds_special_tokens,
        )
        lengths: list[int] = batch["attention_mask"].sum(1).tolist()

        ids = batch["input_ids"].to(self.device)
        mask = batch["attention_mask"].to(self.device)
        if not self.has_encoder:
            return Encoded(states=ids, mask=mask)

        network = self._network(adapter)
        assert not isinstance(network, LlamaNetwork)  # It has no encoder.
        states = []
        tokens = _ENCODER_TOKENS if self.device.type == "cpu" else 32 * _ENCODER_TOKENS
        for rows in length_batches(lengths, tokens):
            width = max(lengths[rows])
            batch_states = network.read(ids[rows, :width], mask[rows, :width])
            states.append(torch.nn.functional.pad(batch_states, (0, 0, 0, ids.shape[1] - width)))
        return Encoded(states=torch.cat(states), mask=mask)

    def with_shared_cross(self, encoded: Encoded) -> Encoded:
        """Return the prompts with everything that sampling, the reference and the update would each compute alike.

        That is the keys and values of cross-attention under the base weights. They are the same in all passes only if
        the encoder is frozen and the decoder trains nothing but a LoRA; otherwise the prompts are returned unchanged.
        """
        if isinstance(self.weights, LoraWeights) and not self.train_encoder:
            return self._network(None).with_shared_cross(encoded)
        return encoded

    def logprobs(
        self,
        encoded: Encoded,
        ids: torch.Tensor,
        temperature: float,
        adapter: str | None = POLICY,
        mask: torch.Tensor | None = None,
        entropy_gradient: bool = False,
    ) -> Scored:
        """Return log-probs of `ids` (B, T), entropies and values, teacher-forced.

        B is a multiple k of the number of prompts; k consecutive rows answer one prompt, which is read once for them.
        Outside `mask` (B, T), if given, all three are 0 and no logits are computed. The mask leaves out nothing that
        the decoder reads: it is causal, so tokens after the end of a response change nothing before it. Masks must not
        be made by `ids != pad`, because T5's start token is its pad token. Entropies have a gradient only with
        `entropy_gradient`.
        """
        network = self._network(adapter)
        chosen, entropy, states = network.logprobs(encoded, ids, mask, temperature, entropy_gradient)
        values = None
        if self.value_head is not None:
            values = place_tokens(self._values(states.detach(), self.value_head), ids, mask)
        return Scored(place_tokens(chosen, ids, mask), place_tokens(entropy, ids, mask), values)

    def rows_at_once(self, length: int) -> int:
        """Return how many responses of `length` tokens to read in one pass without gradients."""
        return max(1, self._network_class.max_tokens_per_pass(self.model.config) // length)

    @torch.no_grad()
    def sample(
        self,
        encoded: Encoded,
        uniforms: torch.Tensor,
        temperature: float,
        adapter: str | None = POLICY,
        top_p: float = 1.0,
    ) -> Responses:
        """Return responses of up to T tokens, drawn by inverse CDF from `uniforms` (B, T) in [0, 1).

        B is a multiple k of the number of prompts; k consecutive rows answer one prompt, which is read once for them.
        Row i depends on uniforms[i] and its prompt alone. With `top_p` below 1 tokens come from the nucleus, and
        log-probs are those in it.
        """
        length = uniforms.shape[1]
        responses = self._empty_responses(uniforms)
        group_size = len(uniforms) // len(encoded.mask)
        steps = self._network(adapter).steps(encoded, length, group_size)
        eos_ids = torch.tensor(self.eos_token_ids, device=self.device)
        rows = torch.arange(len(uniforms), device=self.device)  # still in the batch; some may have ended
        ask_every = _ASK_EVERY.get(self.device.type, _ASK_GPU_EVERY)
        tokens = None

        for t in range(length):
            logits, states = steps.next(tokens)
            logits = logits.float()
            logits = logits if temperature == 1 else logits / temperature
            logprobs = logits.log_softmax(-1)
            if top_p < 1:
                logprobs = nucleus(logprobs, top_p)
            drawn = draw_tokens(logprobs, uniforms[rows, t, None])
            chosen = logprobs.gather(1, drawn).squeeze(1)
            tokens = drawn.squeeze(1)

            counts = ~responses.ended[rows]
            responses.ids[rows, t] = torch.where(counts, tokens, self.pad_token_id)
            responses.response_mask[rows, t] = counts
            responses.logprobs[rows, t] = torch.where(counts, chosen, 0.0)
            if self.value_head is not None and responses.values is not None:
                responses.values[rows, t] = torch.where(counts, self._values(states, self.value_head), 0.0)
            responses.ended[rows] |= torch.isin(tokens, eos_ids)

            if (t + 1) % ask_every > 0:
                continue
            unfinished = ~responses.ended[rows]
            if bool(unfinished.all()):
                continue
            remaining = int(unfinished.sum())
            if remaining == 0:
                break
            # Dropping rows copies the keys and values of the others, so several leave at once.
            if remaining <= _SHRINK_AT * len(rows):
                rows = rows[unfinished]
                tokens = tokens[unfinished]
                steps.keep(unfinished)
        return responses

    def decode(self, responses: Responses) -> list[str]:
        """Return the texts of the responses without special tokens."""
        return [text.strip() for text in self.tokenizer.batch_decode(responses.ids, skip_special_tokens=True)]

    @contextmanager
    def recomputing(self, activations: bool) -> Iterator[None]:
        """Make backward passes of what is computed inside the block recompute activations, or keep them."""
        before = self.checkpointing
        self.checkpointing = activations
        try:
            yield
        finally:
            self.checkpointing = before

    @contextmanager
    def through_plain_network(self) -> Iterator[None]:
        """Make passes inside the block call the model's own forward pass, as if it had no fast network."""
        network_class = self._network_class
        self._network_class = PlainNetwork
        try:
            yield
        finally:
            self._network_class = network_class

    def _network(self, adapter: str | None) -> Network:
        return self._network_class(self.weights, adapter, self.checkpointing)

    def _empty_responses(self, uniforms: torch.Tensor) -> Responses:
        return Responses(
            ids=torch.full_like(uniforms, self.pad_token_id, dtype=torch.long),
            response_mask=torch.zeros_like(uniforms, dtype=torch.bool),
            logprobs=torch.zeros_like(uniforms),
            values=None if self.value_head is None else torch.zeros_like(uniforms),
            ended=torch.zeros(len(uniforms), dtype=torch.bool, device=uniforms.device),
        )

    @staticmethod
    def _values(states: torch.Tensor, head: torch.nn.Linear) -> torch.Tensor:
        # Scaled to unit root mean square, so that one value_lr suits every model (T5's states are large).
        states = torch.nn.functional.rms_norm(states.float(), states.shape[-1:])
        values: torch.Tensor = head(states)
        return values.squeeze(-1)


def _network_class(weights: Weights) -> type[Network]:
    """Return a fast network if it knows every module of the model, with all adapters, and the general one if not."""
    if is_plain_t5(weights):
        return T5Network
    return LlamaNetwork if is_plain_llama(weights) else PlainNetwork


def length_batches(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    """Yield slices of consecutive rows, each of at most `tokens` tokens once padded to its longest, or of one row."""
    start = 0
    longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > start and longest * (row + 1 - start) > tokens:
            yield slice(start, row)
            start = row
            longest = length

    yield slice(start, len(lengths))


def nucleus(logprobs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return log-probs (B, V) of the fewest, likeliest tokens whose probabilities sum to `top_p` or more.

    Those of other tokens are -inf, and the rest is scaled to sum to 1 again. Tokens as likely as the last one of them
    belong to them too. `top_p` is in (0, 1). Holtzman et al. 2020 (nucleus sampling), section 3.1.
    """
    size = min(_NUCLEUS_GUESS, logprobs.shape[-1])
    likeliest = logprobs.topk(size, -1).values
    least = _least_likely(likeliest, top_p)

    # Some rows are less sure than others: these alone are sorted.
    is_larger = likeliest.exp().sum(-1) < top_p
    if bool(is_larger.any()):
        least[is_larger] = _least_likely(logprobs[is_larger].sort(-1, descending=True).values, top_p)
    return logprobs.masked_fill(logprobs < least, -torch.inf).log_softmax(-1)


def _least_likely(descending: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the log-prob (B, 1) at which tokens with log-probs (B, n) in descending order reach `top_p`."""
    probability_before = descending.exp().cumsum(-1) - descending.exp()
    number = (probability_before < top_p).sum(-1, keepdim=True)
    return descending.gather(-1, number - 1)


def draw_tokens(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return for each row of logprobs (B, V) the first token whose cumulative probability exceeds uniforms (B, 1).

    The result is (B, 1).
    """
    cumulative = logprobs.exp().cumsum(-1)
    # The total is 1 only up to rounding, so uniforms are scaled to it. Clamped to 1 - 2^-23, the product stays strictly
    # below the total in float32, and some token always exceeds it.
    threshold = uniforms.clamp_max(1 - 2**-23).to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)
