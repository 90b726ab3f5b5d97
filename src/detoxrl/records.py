"""What travels between the rooms?"""

from __future__ import annotations

from dataclasses import dataclass, fields

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
        return Responses(
            ids=_pad(self.ids, length, pad),
            response_mask=_pad(self.response_mask, length, False),
            logprobs=_pad(self.logprobs, length, 0.0),
            values=_pad(self.values, length, 0.0),
            ended=self.ended,
        )


def _pad(tensor: torch.Tensor, length: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)


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
