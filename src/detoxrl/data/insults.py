"""Which insults does the embedded corpus use, and which of them may the reward model see?"""

from __future__ import annotations

import re

from detoxrl.data.phrases import PHRASES

INSULTS, INTENSIFIERS = PHRASES["insults"], PHRASES["intensifiers"]

# Every third insult never reaches the reward model's training data: what the policy does with these shows
# whether it learned to be civil or to avoid a word list.
UNSEEN_INSULTS = INSULTS[2::3]
SEEN_INSULTS = tuple(word for word in INSULTS if word not in UNSEEN_INSULTS)


def with_article(noun_phrase: str) -> str:
    """Return the noun phrase with "a" or "an" in front."""
    vowel = noun_phrase[0] in "aeiou" and not noun_phrase.startswith("use")
    return f"{'an' if vowel else 'a'} {noun_phrase}"


def insult_pattern(words: tuple[str, ...] = INSULTS) -> re.Pattern[str]:
    """Return a pattern that finds any of `words` (singular or plural, any case) as a whole word."""
    return re.compile(rf"\b(?:{'|'.join(words)})s?\b", re.IGNORECASE)
