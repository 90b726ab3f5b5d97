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

    states: torch.Tensor
    """(B, P, D) hidden states of the encoder; where there is none, (B, P) long token ids."""
    mask: torch.Tensor
    """(B, P) long, 1 = a token of the prompt."""

    def select(self, rows: torch.Tensor) -> Self:
        """Return the rows named by an index or bool tensor, without the padding that none of them needs."""
        mask = self.mask[rows]
        needed = mask.any(0)
        return replace(self, states=self.states[rows][:, needed], mask=mask[:, needed])


@dataclass(frozen=True, kw_only=True)
class Responses:
    """B sampled responses of up to T tokens; positions outside `response_mask` hold pad and 0."""

    ids: torch.Tensor
    """(B, T) long."""
    response_mask: torch.Tensor
    """(B, T) bool, True = counts: every sampled token, EOS too, nothing after it."""
    logprobs: torch.Tensor
    """(B, T) nats, at sampling."""
    values: torch.Tensor
    """(B, T) value head, at sampling."""
    ended: torch.Tensor
    """(B,) bool: EOS was sampled."""


def concatenate(parts: list[Responses]) -> Responses:
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
    texts: list[str]
    """B response texts, special tokens left out."""
    ref_logprobs: torch.Tensor
    """(B, T) nats, by the frozen reference."""
