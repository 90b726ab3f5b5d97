"""How do raw scores become the scores that training sees?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from detoxrl.config.schema import RewardConfig

Reward = Callable[[Sequence[str], Sequence[str]], torch.Tensor]
"""(prompts, responses) -> raw scores (B,): any callable will do."""


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Shift and scale of scores, measured once on responses of the reference."""

    mean: float = 0.0
    std: float = 1.0


def fit_normaliser(scores: torch.Tensor) -> Normaliser:
    """Return mean and std (ddof 1) of raw scores (N,); a constant score keeps std 1."""
    std = float(scores.std())
    return Normaliser(mean=float(scores.mean()), std=std if std > 1e-6 else 1.0)


def is_wordless(texts: Sequence[str]) -> torch.Tensor:
    """Return which texts say nothing: no letter, no digit; (B,) bool."""
    return torch.tensor([not any(map(str.isalnum, text)) for text in texts])


def shape_scores(
    raw: torch.Tensor, texts: Sequence[str], ended: torch.Tensor, normaliser: Normaliser, config: RewardConfig
) -> torch.Tensor:
    """Return scores (B,): normalised, clipped, less a penalty where EOS is missing, fixed where there is no word."""
    scores = ((raw - normaliser.mean) / normaliser.std).clamp(-config.clip, config.clip)
    scores = scores - config.missing_eos_penalty * (~ended).to(scores.dtype)
    return torch.where(is_wordless(texts).to(scores.device), config.empty_score, scores)
