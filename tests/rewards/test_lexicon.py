"""The share of a text's words that are in a list."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detoxrl.errors import InputError
from detoxrl.rewards.lexicon import lexicon_rate, load_lexicon


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "words.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_rate_is_the_share_of_words() -> None:
    texts = ["You are an idiot.", "IDIOTS!", "That is kind.", "", "...", "an idiotic rate", "pig, rat, pig and cat"]
    rates = lexicon_rate(texts)
    assert rates.dtype == torch.float32
    torch.testing.assert_close(rates, torch.tensor([1 / 4, 1, 0, 0, 0, 0, 3 / 5]))


def test_words_are_found_in_their_plain_form() -> None:
    texts = ["You 1d1ot", "an i d i o t", "m0r0ns", "\u0456diot", "idiooot", "room 101"]
    torch.testing.assert_close(lexicon_rate(texts), torch.tensor([1 / 2, 1 / 2, 1, 1, 1, 0]))


def test_a_file_holds_words_and_phrases(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff# mine\r\n\r\n  silly \r\nwaste\nwaste of   space\nC++\na.b\nn1tw1t\n")
    pattern = load_lexicon(path, "reward.lexicon")
    texts = ["You silly man", "a waste  of\nspace indeed", "wastes", "use c++ now", "axb", "nitwit", "wasted", "# mine"]
    torch.testing.assert_close(lexicon_rate(texts, pattern), torch.tensor([1 / 3, 3 / 5, 1, 1 / 3, 0, 1, 0, 0]))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "is not a file"),
        ("", "is empty"),
        ("# only\n\n", "contains no words; give one word or phrase per line"),
        (b"fine\nna\xefve\n", "cannot be read: line 2"),
        ("fine\n***\n", "has the line '***', which has no letter or digit"),
    ],
)
def test_a_file_without_words_is_refused_by_the_name_of_its_setting(
    tmp_path: Path, content: str | bytes | None, rule: str
) -> None:
    path = tmp_path / "none.txt" if content is None else write(tmp_path, content)
    with pytest.raises(InputError) as error:
        load_lexicon(path, "reward.terms.rude")
    assert str(error.value).startswith(f"reward.terms.rude = {str(path)!r}: ")
    assert rule in str(error.value)
