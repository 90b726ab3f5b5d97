"""What travels between the rooms?"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: the row's id and the text the policy reads."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What B prompts of up to P tokens are to the decoder: sampling, reference, values and every epoch share it."""

    states: torch.Tensor  # (B, P, D) hidden states of the encoder; where there is none, (B, P) long token ids.
    mask: torch.Tensor  # (B, P) long, 1 = a token of the prompt.
    # (L, 2, C, H, P', d) keys and values of cross-attention in L layers, P' >= P, where they are shared.
    cross: torch.Tensor | None = None
    rows: torch.Tensor | None = None  # (B,) long, which of the C rows of `cross` these are; None: B = C, in order.

    def select(self, rows: torch.Tensor) -> Self:
        """Return the rows named by an index or bool tensor, without the padding that none of them needs.

        Keys and values are not copied.
        """
        mask = self.mask[rows]
        needed = mask.any(0)
        everything = torch.arange(len(self.mask), device=mask.device) if self.rows is None else self.rows
        kept = None if self.cross is None else everything[rows]
        return replace(self, states=self.states[rows][:, needed], mask=mask[:, needed], rows=kept)

    def row_slice(self, rows: slice) -> Self:
        """Return consecutive rows of a whole batch, as `select`, without a copy of anything."""
        needed = int(self.mask[rows].any(0).sum())  # padding is on one side
        kept = slice(0, needed) if bool(self.mask[:, 0].all()) else slice(self.mask.shape[1] - needed, None)
        cross = None if self.cross is None else self.cross[:, :, rows]
        return replace(self, states=self.states[rows, kept], mask=self.mask[rows, kept], cross=cross)


@dataclass(frozen=True, kw_only=True)
class Responses:
    """B sampled responses of up to T tokens; positions outside `response_mask` hold pad and 0."""

    ids: torch.Tensor  # (B, T) long.
    response_mask: torch.Tensor  # (B, T) bool, True = counts: every sampled token, EOS too, nothing after it.
    logprobs: torch.Tensor  # (B, T) nats, at sampling.
    values: torch.Tensor  # (B, T) value head, at sampling.
    ended: torch.Tensor  # (B,) bool: EOS was sampled.


def concatenate_responses(parts: list[Responses]) -> Responses:
    """Return the rows of all parts, of one T, in order, and cut to the longest response."""
    whole = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Responses)}
    length = int(whole["response_mask"].sum(1).max())
    return Responses(**{name: x[:, :length].contiguous() if x.ndim == 2 else x for name, x in whole.items()})


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One batch of responses with all that the update needs."""

    prompts: list[Prompt]
    encoded: Encoded
    responses: Responses
    texts: list[str]  # B response texts, special tokens left out.
    ref_logprobs: torch.Tensor  # (B, T) nats, by the frozen reference.
    # (b,) ascending, the rows that `encoded` holds, where several processes share the update; None: all of them.
    mine: torch.Tensor | None = None

    def encoded_at(self, rows: torch.Tensor) -> Encoded:
        """Return what is encoded of some of the rows held here."""
        return self.encoded.select(rows if self.mine is None else torch.searchsorted(self.mine, rows))
