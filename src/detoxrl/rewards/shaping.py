"""How do raw values of terms become the scores that training maximises?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from detoxrl.config.schema import Config
from detoxrl.config.terms import TERM_KINDS, Term

_SMALLEST_STD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Shift and scale of each term's raw values, (terms,) each, measured once on responses of the reference."""

    means: tuple[float, ...]
    stds: tuple[float, ...]

    @classmethod
    def identity(cls, terms: Sequence[Term]) -> Self:
        """Return the one that leaves values as they are."""
        return cls(means=(0.0,) * len(terms), stds=(1.0,) * len(terms))

    def to_json(self, terms: Sequence[Term]) -> dict[str, Any]:
        """Return mean and std of each term by its name."""
        by_name = zip(terms, self.means, self.stds, strict=True)
        return {term.name: {"mean": mean, "std": std} for term, mean, std in by_name}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], terms: Sequence[Term]) -> Self | None:
        """Return what `to_json` stored of these terms; None if it was of others.

        Earlier versions stored the mean and std of their only term, without its name.
        """
        if "mean" in stored and len(terms) == 1:
            return cls(means=(stored["mean"],), stds=(stored["std"],))
        if set(stored) != {term.name for term in terms}:
            return None
        means = tuple(stored[term.name]["mean"] for term in terms)
        stds = tuple(stored[term.name]["std"] for term in terms)
        return cls(means=means, stds=stds)


def fit_normaliser(raw: torch.Tensor, terms: Sequence[Term]) -> Normaliser:
    """Return mean and std (ddof 1) of raw values (N, terms).

    A std is not below that of the term's kind. If all values are equal and the kind has no such bound, std is 1.
    """
    stds = []
    for values, term in zip(raw.unbind(1), terms, strict=True):
        std = max(float(values.std()), TERM_KINDS[term.kind].least_std)
        stds.append(std if std > _SMALLEST_STD else 1.0)
    means = tuple(float(values.mean()) for values in raw.unbind(1))
    return Normaliser(means=means, stds=tuple(stds))


def is_wordless(texts: Sequence[str]) -> torch.Tensor:
    """Return which texts contain neither a letter nor a digit, (N,) bool."""
    return torch.tensor([not any(map(str.isalnum, text)) for text in texts])


def combined(raw: torch.Tensor, terms: Sequence[Term], normaliser: Normaliser, clip: float) -> torch.Tensor:
    """Return the scores (B,) that raw values (B, terms) add up to.

    Each value is normalised, clipped, and weighted, with the sign that makes more of it better. Where a value is worse
    than the gate of its term, what terms add to the score is taken away, and what they subtract stays: such a response
    scores 0 at most, which is the mean of the initial policy.
    """
    means = torch.tensor(normaliser.means, device=raw.device)
    stds = torch.tensor(normaliser.stds, device=raw.device)
    weights = torch.tensor([term.better * term.weight for term in terms], device=raw.device)
    parts = ((raw - means) / stds).clamp(-clip, clip) * weights

    is_shut = gates_shut(raw, terms)
    return torch.where(is_shut[:, None], parts.clamp(max=0), parts).sum(1)


def gates_shut(raw: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """Return which responses have a value worse than the gate of its term, (B,) bool, from raw values (B, terms)."""
    is_shut = torch.zeros(len(raw), dtype=torch.bool, device=raw.device)
    for values, term in zip(raw.unbind(1), terms, strict=True):
        if term.gate is not None:
            is_shut |= values * term.better < term.gate * term.better
    return is_shut


def overall(raw: torch.Tensor, terms: Sequence[Term], normaliser: Normaliser, clip: float) -> torch.Tensor:
    """Return the score (B,) that is shown for raw values (B, terms), and that compares responses: higher is better.

    It is the value of the only term, negated where a lower value is better, or the combination of several.
    """
    if len(terms) > 1:
        return combined(raw, terms, normaliser, clip)
    return raw[:, 0] if terms[0].better == 1 else -raw[:, 0]


def shape_scores(
    raw: torch.Tensor, texts: Sequence[str], ended: torch.Tensor, normaliser: Normaliser, config: Config
) -> torch.Tensor:
    """Return the scores (B,) of responses from the raw values (B, terms) of their terms.

    The combined score is reduced by a penalty if the response did not end by itself (`ended`, (B,) bool). A response
    without words gets a fixed score instead.
    """
    terms = config.reward.measured_terms
    scores = combined(raw, terms, normaliser, config.reward.clip)
    scores = scores - config.missing_eos_penalty * (~ended).to(scores.dtype)
    return torch.where(is_wordless(texts).to(scores.device), config.empty_score, scores)
