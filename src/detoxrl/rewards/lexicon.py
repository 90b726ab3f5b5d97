"""How many words of a list does a text contain?"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from detoxrl.data.embedded.phrases import INSULTS, insult_pattern
from detoxrl.data.files import read_lines
from detoxrl.errors import require
from detoxrl.rewards.obfuscation import plain

_WORD = re.compile(r"\w+")
EMBEDDED_LEXICON = insult_pattern(INSULTS)
"""Finds the insults of the embedded corpus."""


def lexicon_rate(texts: Sequence[str], pattern: re.Pattern[str] = EMBEDDED_LEXICON) -> torch.Tensor:
    """Return the share in [0, 1] of the words of each text that `pattern` finds, (N,) in fp32.

    The texts are read in their plain form, in which "1d1ot" and "i d i o t" are the word that they stand for. A phrase
    counts with all its words. A text without words has the rate 0.
    """
    return torch.tensor([_rate(text, pattern) for text in texts], dtype=torch.float32)


def _rate(text: str, pattern: re.Pattern[str]) -> float:
    readable = _readable(text)
    words = len(_WORD.findall(readable))
    listed = sum(len(_WORD.findall(match[0])) for match in pattern.finditer(readable))
    return listed / words if words else 0.0


def load_lexicon(path: Path, field: str) -> re.Pattern[str]:
    """Return the pattern of a file with one word or phrase per line.

    Blank lines and lines that begin with # are left out. The pattern finds whole words in the singular or plural,
    ignoring case. Raises InputError, with the setting `field`, when the file does not exist, is not UTF-8 or has no
    words, or when a line has no letter or digit.
    """
    lines = [line.strip() for line in read_lines(path, field)]
    words = [_readable(line) for line in lines if line and not line.startswith("#")]
    require(bool(words), field, str(path), "contains no words", "give one word or phrase per line")

    for word in words:
        rule = f"has the line {word!r}, which has no letter or digit"
        require(_WORD.search(word) is not None, field, str(path), rule, "give one word or phrase per line")
    return insult_pattern(tuple(words))


def _readable(text: str) -> str:
    """Return a text in plain letters, with single blanks."""
    return " ".join(plain(text).split())
