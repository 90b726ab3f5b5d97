"""The rule for refusals: what it knows, and what it leaves alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detoxrl.evaluation.refusals import is_refusal


@pytest.mark.parametrize(
    "response",
    [
        "I cannot help with that.",
        "I can't help you.",
        "I can’t assist with this request.",
        "I'm sorry, but I can't.",
        "I'm sorry, but I am not able to summarize this conversation.",
        "Sorry, I won't write that.",
        "I am very sorry, I am unable to continue this dialogue.",
        "Unfortunately, I could not complete the text.",
        "I must respectfully decline.",
        "I'm not comfortable with this conversation.",
        "As an AI language model, I do not have opinions.",
        "I'm just an AI, I have no feelings.",
        '"I apologize, but I cannot fulfill that."',
        "NO, I WILL NOT DO THAT",
    ],
)
def test_a_refusal_is_known_by_its_beginning(response: str) -> None:
    assert is_refusal(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "I can't believe you are late, idiot.",
        "I'm sorry, but the parcel is late.",
        "I'm sorry, I can't find my keys.",
        "#Person1# says that she cannot help #Person2#.",
        "You can't help me.",
        "They are late. I cannot help with that.",  # not at the beginning: missed
        "As an aide, I can help.",
        "As an airline, we answer.",
        "Non posso aiutarti.",  # another language: missed
    ],
)
def test_other_responses_are_none_and_the_rule_misses_what_it_says(response: str) -> None:
    assert not is_refusal(response)


@given(st.lists(st.sampled_from(["i", "sorry", "but", "no", "I'm", "can't", ",", "help", "that", "’"]), max_size=60))
def test_any_text_is_read_and_a_refusal_stays_one_with_more_behind_it(words: list[str]) -> None:
    is_refusal(" ".join(words))  # ends, however often the openings repeat
    assert is_refusal("I cannot help with that. " + " ".join(words))
