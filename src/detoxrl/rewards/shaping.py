"""How do raw scores become the scores that training maximises?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from detoxrl.config.schema import Config
from detoxrl.models.types import Prompt

Reward = Callable[[Sequence[Prompt], Sequence[str]], torch.Tensor]
"""(prompts, responses) -> raw scores (B,), higher is better."""


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Shift and scale of raw scores, measured once on responses of the reference."""

    mean: float = 0.0
    std: float = 1.0


def fit_normaliser(scores: torch.Tensor) -> Normaliser:
    """Return mean and std (ddof 1) of raw scores (N,). If all scores are equal, std is 1."""
    std = float(scores.std())
    return Normaliser(mean=float(scores.mean()), std=std if std > 1e-6 else 1.0)


def is_wordless(texts: Sequence[str]) -> torch.Tensor:
    """Return which texts contain neither a letter nor a digit, (B,) bool."""
    return torch.tensor([not any(map(str.isalnum, text)) for text in texts])


def shape_scores(
    raw: torch.Tensor, texts: Sequence[str], ended: torch.Tensor, normaliser: Normaliser, config: Config
) -> torch.Tensor:
    """Return the scores (B,) of responses from their raw scores (B,).

    A score is normalised, clipped, and reduced by a penalty if the response did not end by itself (`ended`, (B,) bool).
    A response without words gets a fixed score instead.
    """
    normalised = (raw - normaliser.mean) / normaliser.std
    clipped = normalised.clamp(-config.reward.clip, config.reward.clip)
    scores = clipped - config.missing_eos_penalty * (~ended).to(clipped.dtype)
    return torch.where(is_wordless(texts).to(scores.device), config.reward.empty_score, scores)
