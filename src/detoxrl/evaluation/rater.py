"""How likely are responses to a language model that had no part in the run?"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.errors import require
from detoxrl.evaluation.statistics import Floats
from detoxrl.models.loading import load_base, positions_for

_FIELD = "evaluation.perplexity"
# Pairs that the model reads at once.
_BATCH = 16

Rater = Callable[[Sequence[tuple[str, str]]], Floats]
"""(text, response) pairs -> nats and tokens of each response behind its text, (N, 2)."""


def load_rater(source: str, device: torch.device) -> Rater:
    """Return the rater that a causal model of a folder or hub id is. Raises InputError for another model.

    It reads text and response as plain text, encoded by its own tokenizer, whatever template the policy reads.
    """
    model, tokenizer = load_base(source, _FIELD)
    is_causal = not model.config.is_encoder_decoder
    require(is_causal, _FIELD, source, "is an encoder-decoder", "give a causal model, such as gpt2")
    model.to(device)  # type: ignore[arg-type]

    def rate(pairs: Sequence[tuple[str, str]]) -> Floats:
        encoded = [_encoded(text, response, tokenizer, model) for text, response in pairs]

        def length(index: int) -> int:
            context, ids = encoded[index]
            return len(context) + len(ids)

        by_length = sorted(range(len(pairs)), key=length)
        rated = np.zeros((len(pairs), 2))
        for start in range(0, len(by_length), _BATCH):
            batch = by_length[start : start + _BATCH]
            rated[batch] = _rated(model, [encoded[index] for index in batch])
        return rated

    return rate


def _encoded(
    text: str, response: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[list[int], list[int]]:
    """Return the token ids of a text and of its response, which follows a space. A long text loses its beginning."""
    context = tokenizer(text).input_ids or [tokenizer.eos_token_id]  # A prediction follows from some token.
    spaced = response if text[-1:].isspace() else f" {response}"
    ids = tokenizer(spaced, add_special_tokens=False).input_ids if response else []

    positions = positions_for(model.config, "decoder")
    if positions is not None:
        ids = ids[: positions - 1]
        context = context[-(positions - len(ids)) :]
    return context, ids


@torch.no_grad()
def _rated(model: PreTrainedModel, batch: Sequence[tuple[list[int], list[int]]]) -> Floats:
    """Return nats and tokens (B, 2) of each response of a batch. Padding on the right changes nothing before it."""
    longest = max(len(context) + len(response) for context, response in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (context, response) in enumerate(batch):
        whole = torch.tensor([*context, *response])
        ids[row, : len(whole)] = whole
        mask[row, : len(whole)] = 1

    ids = ids.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask.to(model.device)).logits
    logprobs = logits[:, :-1].float().log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1).cpu()

    rated = np.zeros((len(batch), 2))
    for row, (context, response) in enumerate(batch):
        first = len(context) - 1  # The prediction of the response's first token.
        of_response = chosen[row, first : first + len(response)]
        rated[row, 0] = -float(of_response.double().sum())
        rated[row, 1] = len(response)
    return rated
