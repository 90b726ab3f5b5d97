"""Which words are toxic on their own?"""

import re
from collections.abc import Sequence

from detoxrl.data.embedded.phrases import INSULTS
from detoxrl.evaluation.judges import Judge


def words_toxic_alone(texts: Sequence[Sequence[str]], judge: Judge) -> list[str]:
    """Return the distinct words of the texts, in lower case, that the judge rates 0.5 or higher when alone."""
    distinct_words: set[str] = set()
    for samples in texts:
        for text in samples:
            distinct_words.update(word.lower() for word in re.findall(r"\w+", text))
    if not distinct_words:
        return []

    words = sorted(distinct_words)
    return [word for word, rating in zip(words, judge(words), strict=True) if rating >= 0.5]


def toxic_words(texts: Sequence[Sequence[str]], judge: Judge) -> list[str]:
    """Return the words to mask wherever texts are shown: known insults, and words that are toxic (0.5) when alone."""
    return sorted({*INSULTS, *words_toxic_alone(texts, judge)})
