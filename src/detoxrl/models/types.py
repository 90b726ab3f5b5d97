"""Which records of prompts and responses do the packages pass to each other?"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: the id of its row, the text that the policy reads, and what else a reward may ask for by name."""

    id: str
    text: str
    row_text: str = ""  # The row's own text, without templates, with the toxic turn of a stressed row.
    initial_response: str | None = None  # Of the initial policy, where a reward compares with it.
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """B prompts of up to P tokens in the form the decoder reads; sampling, reference and every epoch share it.

    A pass may read k responses to each prompt, in k consecutive rows: then B prompts serve k * B responses.
    """

    states: torch.Tensor  # (B, P, D) hidden states of the encoder; token ids (B, P), long, in a causal model.
    mask: torch.Tensor  # (B, P) long, 1 = a token of the prompt.
    # (L, 2, C, H, P', d) keys and values of cross-attention in L layers, P' >= P; None if each pass computes its own.
    cross: torch.Tensor | None = None
    rows: torch.Tensor | None = None  # (B,) long, the row of `cross` (of C) of each prompt; None: C = B, same order.

    def select(self, rows: torch.Tensor) -> Self:
        """Return the rows given by an index or bool tensor, without the padding that none of them needs.

        The keys and values in `cross` are not copied; the result refers to its rows of them.
        """
        mask = self.mask[rows]
        needed = mask.any(0)

        cross_rows = None
        if self.cross is not None:
            every_row = torch.arange(len(self.mask), device=mask.device) if self.rows is None else self.rows
            cross_rows = every_row[rows]
        return replace(self, states=self.states[rows][:, needed], mask=mask[:, needed], rows=cross_rows)

    def row_slice(self, rows: slice) -> Self:
        """Return consecutive rows of a whole batch, as `select` does, as views: nothing is copied."""
        width = int(self.mask[rows].any(0).sum())
        # All padding is on one side: if every row has a token in the first column, it is on the right.
        padded_right = bool(self.mask[:, 0].all())
        columns = slice(0, width) if padded_right else slice(self.mask.shape[1] - width, None)

        cross = None if self.cross is None else self.cross[:, :, rows]
        return replace(self, states=self.states[rows, columns], mask=self.mask[rows, columns], cross=cross)

    def repeated(self, times: int) -> Self:
        """Return each prompt so many times in succession, one for each response of its group.

        Only for passes that compute their own keys and values: those in `cross` are not repeated.
        """
        states = self.states.repeat_interleave(times, 0)
        mask = self.mask.repeat_interleave(times, 0)
        return replace(self, states=states, mask=mask)


@dataclass(frozen=True, kw_only=True)
class Responses:
    """B sampled responses of up to T tokens; positions outside `response_mask` hold the pad id and 0."""

    ids: torch.Tensor  # (B, T) long.
    response_mask: torch.Tensor  # (B, T) bool, True for every sampled token, EOS included, and for nothing after it.
    logprobs: torch.Tensor  # (B, T) nats, at sampling.
    values: torch.Tensor | None  # (B, T) of the value head, at sampling; None without one.
    ended: torch.Tensor  # (B,) bool: EOS was sampled.


def concatenate_responses(parts: list[Responses]) -> Responses:
    """Return the rows of all parts in order, cut to the longest response. All parts must have the same T."""
    length = max(int(part.response_mask.sum(1).max()) for part in parts)
    values = [part.values[:, :length] for part in parts if part.values is not None]
    return Responses(
        ids=torch.cat([part.ids[:, :length] for part in parts]),
        response_mask=torch.cat([part.response_mask[:, :length] for part in parts]),
        logprobs=torch.cat([part.logprobs[:, :length] for part in parts]),
        values=torch.cat(values) if values else None,
        ended=torch.cat([part.ended for part in parts]),
    )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One batch of responses with everything that the update needs.

    The k responses to a prompt are consecutive rows, so row i answers prompt i // k.
    """

    prompts: list[Prompt]  # B / k prompts.
    encoded: Encoded
    responses: Responses
    texts: list[str]  # B response texts without special tokens.
    ref_logprobs: torch.Tensor  # (B, T) nats, under the frozen reference.
    # (b,) ascending: the prompts that `encoded` holds when several processes share the update; None: all prompts.
    local_prompts: torch.Tensor | None = None

    @property
    def group_size(self) -> int:
        """The number k of responses to a prompt."""
        return len(self.texts) // len(self.prompts)

    @property
    def prompts_of_responses(self) -> list[Prompt]:
        """The prompt of each of the B responses."""
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    def encoded_at(self, prompts: torch.Tensor) -> Encoded:
        """Return some of the batch's prompts (long), encoded; this process must hold them."""
        if self.local_prompts is not None:
            prompts = torch.searchsorted(self.local_prompts, prompts)
        return self.encoded.select(prompts)
