"""How far do methods without training get: a word filter, and picking the best of n samples?"""

import math
import re
from collections.abc import Sequence
from typing import TypeVar

from detoxrl.data.embedded.phrases import SEEN_INSULTS
from detoxrl.evaluation.insults import words_toxic_alone
from detoxrl.evaluation.judges import Judge
from detoxrl.evaluation.statistics import Floats

Texts = Sequence[Sequence[str]]  # N prompts with k responses each
Response = TypeVar("Response")


def word_filter(texts: Texts, judge: Judge | None) -> list[list[str]]:
    """Return the responses without known insults and without words that `judge` rates 0.5 or higher when alone.

    The known insults are those that the embedded reward was trained on. `judge` is the reward's classifier or None: an
    independent judge must not choose the words, because it would then rate its own choice.
    """
    words = {*SEEN_INSULTS}
    if judge:
        words.update(words_toxic_alone(texts, judge))

    # Longer words first, so that no word hides another that begins with it.
    forms = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    pattern = re.compile(rf"\b(?:{forms})s?\b\s*", re.IGNORECASE)
    return [[pattern.sub("", text).strip() for text in samples] for samples in texts]


def best_of(pool: Sequence[Sequence[Response]], scores: Floats, n: int) -> list[list[Response]]:
    """Return, for each prompt, the response with the highest score of each n samples in its `pool`: m // n responses.

    `scores` is (N, m). Best-of-n: Stiennon et al. 2020, section 4.3. The groups of n do not overlap, so the responses
    are independent draws; samples that fill no group are left out.
    """
    groups = scores.shape[1] // n
    picks = scores[:, : groups * n].reshape(len(scores), groups, n).argmax(2)
    best = []
    for samples, prompt_picks in zip(pool, picks, strict=True):
        best.append([samples[group * n + pick] for group, pick in enumerate(prompt_picks)])
    return best


def best_of_kl(n: int) -> float:
    """Return an upper bound on the KL of best-of-n to the policy that it samples from, in nats.

    Stiennon et al. 2020, appendix G.3; Beirami et al. 2024 show that it is a bound.
    """
    return math.log(n) - (n - 1) / n
