"""Which words are masked, and how?

The words of a run are in its masked_words.json, which `evaluation.insults.toxic_words` fills: the known insults, and
every word that the judge scores at 0.5 or above on its own.
"""

import re
from collections.abc import Sequence


def masking_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for any of `words`, singular or plural, as a whole word in any case; its group 1 is the word."""
    longest_first = sorted(words, key=len, reverse=True)
    forms = "|".join(_singular_or_plural(word) for word in longest_first)
    # Not \b: it counts an underscore as a letter, so the word in _word_ would stay readable.
    return re.compile(rf"(?<![^\W_])({forms})(?![^\W_])", re.IGNORECASE)


def _singular_or_plural(word: str) -> str:
    if word.endswith("y"):
        return f"{re.escape(word.removesuffix('y'))}(?:y|ies)"
    return f"{re.escape(word)}(?:e?s)?"


def segments(text: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    """Split `text` into pieces, each with whether it is masked. Joined, the pieces are the text again."""
    # A pattern with one group splits into plain and matched pieces in turn.
    pieces = enumerate(pattern.split(text))
    return [(piece, index % 2 == 1) for index, piece in pieces if piece]


def mask(text: str, pattern: re.Pattern[str], blot: str = "*") -> str:
    """Return `text` with a `blot` for every letter of a masked word but the first; its length does not change."""
    return pattern.sub(lambda match: match[0][0] + blot * (len(match[0]) - 1), text)
