"""What is reached without training: by a word filter, and by picking among samples?"""

import math
import re
from collections.abc import Sequence

from detoxrl.data.embedded.phrases import SEEN_INSULTS
from detoxrl.evaluation.judges import Judge
from detoxrl.evaluation.statistics import Floats

Texts = Sequence[Sequence[str]]  # N prompts with k responses each


def toxic_alone(texts: Texts, judge: Judge) -> list[str]:
    """Return the distinct words of some responses, lower-cased, that a judge rates at 0.5 or above when alone."""
    words = sorted({word.lower() for row in texts for text in row for word in re.findall(r"\w+", text)})
    return [word for word, rate in zip(words, judge(words), strict=True) if rate >= 0.5] if words else []


def word_filter(texts: Texts, judge: Judge | None) -> list[list[str]]:
    """Return the responses without the words that `judge`, the reward's own, rates at 0.5 or above when alone.

    The insults that the embedded reward knows go in any case. A judge that is to stay independent must not choose.
    """
    rated = toxic_alone(texts, judge) if judge else []
    forms = "|".join(map(re.escape, sorted({*SEEN_INSULTS, *rated}, key=len, reverse=True)))
    pattern = re.compile(rf"\b(?:{forms})s?\b\s*", re.IGNORECASE)
    return [[pattern.sub("", text).strip() for text in row] for row in texts]


def best_of(pool: Texts, scores: Floats, n: int) -> list[list[str]]:
    """Return for each prompt the best by `scores` (N, m) of each n samples of its `pool`: m // n responses.

    Stiennon et al. 2020, section 4.3; the groups do not overlap, so its responses are independent draws.
    """
    picks = scores[:, : scores.shape[1] // n * n].reshape(len(scores), -1, n).argmax(2)
    beside = zip(pool, picks, strict=True)
    return [[row[group * n + pick] for group, pick in enumerate(chosen)] for row, chosen in beside]


def best_of_kl(n: int) -> float:
    """Return the KL of best-of-n in nats (Stiennon et al. 2020, appendix G.3), a bound (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n
