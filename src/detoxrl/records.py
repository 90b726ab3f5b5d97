"""What travels between the rooms?"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch.nn.functional import pad as pad_with


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

    def select(self, rows: torch.Tensor) -> Encoded:
        """Return the rows named by an index or bool tensor, without the padding that none of them needs."""
        mask = self.mask[rows]
        needed = mask.any(0)
        return Encoded(states=self.states[rows][:, needed], mask=mask[:, needed])


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

    def to_length(self, length: int, pad: int) -> Responses:
        """Return the same responses padded, or cut of padding, to T = `length`."""
        fill: dict[str, float] = {"ids": pad, "response_mask": False, "logprobs": 0.0, "values": 0.0}
        right = (0, length - self.ids.shape[1])
        return replace(self, **{name: pad_with(getattr(self, name), right, value=v) for name, v in fill.items()})


def concatenate(parts: list[Responses], pad: int) -> Responses:
    """Return the rows of all parts in order, padded to the longest T."""
    length = max(part.ids.shape[1] for part in parts)
    padded = [part.to_length(length, pad) for part in parts]
    return Responses(**{f.name: torch.cat([getattr(part, f.name) for part in padded]) for f in fields(Responses)})


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
