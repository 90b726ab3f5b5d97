"""What reads responses beside the judges?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from detoxrl.evaluation.baselines import Texts
from detoxrl.evaluation.judges import Judge
from detoxrl.evaluation.rater import Rater
from detoxrl.evaluation.statistics import Floats
from detoxrl.models.sentences import Encode
from detoxrl.models.types import Prompt

Pairs = Sequence[tuple[str, str]]  # N pairs of texts
ScoredPairs = Sequence[tuple[Prompt, str]]  # N prompts with a response each
_First = TypeVar("_First")


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The models that read responses beside the judges; None where the config names no such model."""

    # The reward of (prompt, response) pairs: `score` (N,), and of several terms `score/NAME` (N,) each.
    reward: Callable[[ScoredPairs], Mapping[str, Floats]] | None = None
    # A sentence encoder: unit vectors (N, D) of texts.
    encode: Encode | None = None
    # P(entailment) in [0, 1], (N,), of (text of a row, response) pairs.
    entails: Callable[[Pairs], Floats] | None = None
    # Nats and tokens (N, 2) of the responses of (text of a row, response) pairs, by another language model.
    rate: Rater | None = None
    # P(fluent) in [0, 1], (N,), of texts.
    fluent: Judge | None = None
    # The scores of perspective-minilm for N texts, (N, 8), in the order of PERSPECTIVE_SCORES.
    perspective: Callable[[Sequence[str]], Floats] | None = None


def paired(firsts: Sequence[_First], texts: Texts) -> list[tuple[_First, str]]:
    """Return N k pairs: each of the k responses to a prompt behind that prompt's entry in `firsts`, (N,)."""
    return [(first, text) for first, samples in zip(firsts, texts, strict=True) for text in samples]
