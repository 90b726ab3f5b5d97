"""Do several terms add up to the score that their definition gives?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detoxrl.config.recipes import recipe
from detoxrl.config.terms import GUARDED_TERMS, Term, parse_term, parse_terms
from detoxrl.data.embedded.phrases import SEEN_INSULTS, UNSEEN_INSULTS
from detoxrl.errors import InputError
from detoxrl.models.types import Prompt
from detoxrl.rewards.overlap import repeated
from detoxrl.rewards.shaping import Normaliser, combined, fit_normaliser, gates_shut, overall, shape_scores
from detoxrl.rewards.terms import Reward, ScoredTerm, lexicon_score, outside, text_score, worse_of_plain

PROMPT = Prompt(id="a", text="Summarize: Tom lost the key.", row_text="Tom lost the key of the house.")
TERMS = parse_terms(["classifier,weight=2", "copy,gate=0.7,weight=0.5"])
NORMALISER = Normaliser(means=(1.0, 0.2), stds=(2.0, 0.1))


def twin(raw: Sequence[float], terms: Sequence[Term], normaliser: Normaliser, clip: float) -> float:
    """The combined score of one response, by its definition, in float64."""
    parts = []
    for value, term, mean, std in zip(raw, terms, normaliser.means, normaliser.stds, strict=True):
        standard = max(-clip, min(clip, (value - mean) / std))
        parts.append(term.better * term.weight * standard)

    shut = any(
        term.gate is not None and (value < term.gate if term.better == 1 else value > term.gate)
        for value, term in zip(raw, terms, strict=True)
    )
    return math.fsum(min(part, 0.0) if shut else part for part in parts)


def test_the_combined_score_has_the_value_computed_by_hand() -> None:
    # Normalised 1 and 1; 2 * 1 - 0.5 * 1.
    assert combined(torch.tensor([[3.0, 0.3]]), TERMS, NORMALISER, 10.0).tolist() == [pytest.approx(1.5)]
    # Copying 0.8 shuts the gate: the credit of 2 is gone, the debit of 0.5 * 6 stays.
    assert combined(torch.tensor([[3.0, 0.8]]), TERMS, NORMALISER, 10.0).tolist() == [pytest.approx(-3.0)]
    # Clipped at 5: 2 * 5 + 0.5 * 2.
    assert combined(torch.tensor([[99.0, 0.0]]), TERMS, NORMALISER, 5.0).tolist() == [pytest.approx(11.0)]


values = st.floats(min_value=-20, max_value=20, width=32)


@given(raw=st.lists(st.tuples(values, values, values), min_size=1, max_size=6), clip=st.floats(0.5, 20))
def test_the_combined_score_is_its_definition(raw: list[tuple[float, float, float]], clip: float) -> None:
    terms = parse_terms(["classifier,gate=-3", "similarity,weight=0.25", "copy,gate=8,weight=3"])
    normaliser = Normaliser(means=(0.5, 1.0, -2.0), stds=(2.0, 0.5, 4.0))
    found = combined(torch.tensor(raw, dtype=torch.float64), terms, normaliser, clip)
    expected = [twin(one, terms, normaliser, clip) for one in raw]
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(raw=st.lists(st.tuples(values, values), min_size=1, max_size=6))
def test_a_response_behind_a_shut_gate_scores_no_more_than_the_initial_mean(raw: list[tuple[float, float]]) -> None:
    tensor = torch.tensor(raw)
    scores = combined(tensor, TERMS, NORMALISER, 10.0)
    assert bool((scores[gates_shut(tensor, TERMS)] <= 0).all())


def test_a_gate_is_shut_by_values_beyond_it_in_the_worse_direction() -> None:
    terms = parse_terms(["similarity,gate=0.3", "copy,gate=0.7"])
    raw = torch.tensor([[0.3, 0.7], [0.29, 0.0], [0.9, 0.71]])
    assert gates_shut(raw, terms).tolist() == [False, True, True]


def test_one_term_is_shown_as_it_is_and_several_as_their_sum() -> None:
    raw = torch.tensor([[3.0, 0.3]])
    assert overall(raw[:, :1], TERMS[:1], Normaliser(means=(1.0,), stds=(2.0,)), 10.0).tolist() == [3.0]
    assert overall(raw, TERMS, NORMALISER, 10.0).tolist() == [pytest.approx(1.5)]


@pytest.mark.parametrize("text", ["lexicon", "length,maximum=20", "copy", "repetition"])
def test_the_score_of_a_single_term_is_higher_for_a_better_response(text: str) -> None:
    (term,) = parse_terms([text])
    raw = torch.tensor([[0.0], [0.5], [0.25]])
    assert overall(raw, [term], Normaliser(means=(0.1,), stds=(0.05,)), 10.0).tolist() == [0.0, -0.5, -0.25]


def test_a_share_that_hardly_varies_is_not_blown_up() -> None:
    raw = torch.tensor([[0.0, 5.0], [0.0, 7.0], [0.01, 6.0]])
    found = fit_normaliser(raw, parse_terms(["copy", "classifier"]))
    assert found.stds == (0.05, 1.0)
    assert found.means == pytest.approx((0.01 / 3, 6.0))


def test_the_normaliser_is_stored_by_the_names_of_terms() -> None:
    stored = NORMALISER.to_json(TERMS)
    assert stored == {"classifier": {"mean": 1.0, "std": 2.0}, "copy": {"mean": 0.2, "std": 0.1}}
    assert Normaliser.from_json(stored, TERMS) == NORMALISER
    # As an earlier version stored it.
    assert Normaliser.from_json({"mean": 1.0, "std": 2.0}, TERMS[:1]) == Normaliser(means=(1.0,), stds=(2.0,))
    # A reward given anew in Python has no scale from the training of another.
    assert Normaliser.from_json(stored, TERMS[:1]) is None


def test_shaped_scores_follow_the_terms_of_the_config() -> None:
    terms = ["classifier,weight=2", "copy,gate=0.7,weight=0.5", "missing_eos,weight=0.25", "empty,weight=4"]
    config = recipe("own", {"reward.terms": terms})
    raw = torch.tensor([[3.0, 0.3], [3.0, 0.3], [3.0, 0.3]])
    ended = torch.tensor([True, False, True])
    scores = shape_scores(raw, ["a", "b", "..."], ended, NORMALISER, config)
    assert scores.tolist() == [pytest.approx(1.5), pytest.approx(1.25), -4.0]


def values_of(text: str, response: str, prompt: Prompt = PROMPT) -> float:
    term = parse_term(text)
    return float(text_score(term, None)([prompt], [response])[0])


def test_each_term_of_texts_has_the_value_computed_by_hand() -> None:
    assert values_of("copy", "Tom lost the key of") == 1.0
    assert values_of("copy", "Ann found it in a box") == 0.0
    assert values_of("repetition", "so it is so it is so it is") == pytest.approx(1 - 3 / 7)
    assert values_of("length,minimum=4,maximum=6", "one two three") == 0.25
    assert values_of("length,minimum=4,maximum=6", "one two three four five") == 0.0
    assert values_of("length,maximum=2", "one two three") == 0.5
    assert values_of("source_similarity", PROMPT.row_text) == pytest.approx(1.0)

    compared = Prompt(id="a", text="t", initial_response="Tom is upset.")
    assert values_of("similarity", "Tom is upset.", compared) == pytest.approx(1.0)
    assert values_of("similarity", "Buy milk", compared) < 0.2


def test_the_distance_from_bounds_is_a_share_of_the_bound() -> None:
    assert [outside(words, 4, 8) for words in (0, 2, 4, 8, 12, 16)] == [1.0, 0.5, 0.0, 0.0, 0.5, 1.0]
    assert outside(3, 0, 0) == 3.0


def test_repetition_counts_triples_that_occurred_before() -> None:
    assert [repeated(text) for text in ("", "a b c", "a b c d", "a a a a")] == [0.0, 0.0, 0.0, 0.5]


def test_a_reward_returns_a_column_for_each_term() -> None:
    def length(_: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        return torch.tensor([float(len(response)) for response in responses])

    copy = parse_term("copy")
    reward = Reward((ScoredTerm(parse_term("function"), length), ScoredTerm(copy, text_score(copy, None))))
    values = reward([PROMPT, PROMPT], ["Tom lost the key", "No"])
    assert values.tolist() == [[16.0, 1.0], [2.0, 0.0]]
    assert not reward.reads_initial_responses
    similar = parse_term("similarity")
    assert Reward((ScoredTerm(similar, text_score(similar, None)),)).reads_initial_responses


def test_a_term_that_compares_responses_sees_all_of_a_batch() -> None:
    read: list[int] = []

    def length(_: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        read.append(len(responses))
        return torch.tensor([float(len(response)) for response in responses])

    same = parse_term("sameness")
    reward = Reward((ScoredTerm(parse_term("function"), length), ScoredTerm(same, text_score(same, None))))
    prompts = [Prompt(id=text, text=text) for text in "abc"]
    responses = ["I see.", "I see.", "Why?"]
    whole = [[6.0, 0.5], [6.0, 0.5], [4.0, 0.0]]
    assert reward(prompts, responses).tolist() == whole

    # In parts, as several processes score, and together at the end.
    parts = [reward.alone(prompts[rows], responses[rows]) for rows in (slice(0, 1), slice(1, 3))]
    assert torch.cat(parts).tolist() == [[6.0, 0.0], [6.0, 0.0], [4.0, 0.0]]
    assert reward.with_shared(torch.cat(parts), prompts, responses).tolist() == whole
    assert read == [3, 1, 2]


def test_a_disguised_text_is_read_in_plain_letters_too_and_the_worse_score_counts() -> None:
    read: list[str] = []

    def classifier(_: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        read.extend(responses)
        return torch.tensor([-1.0 if "idiot" in response else 1.0 for response in responses])

    found = worse_of_plain(classifier)([PROMPT] * 3, ["You 1d1ot.", "Fine.", "An idiot."])
    assert found.tolist() == [-1.0, 1.0, -1.0]
    # Only what was disguised is read again.
    assert read == ["You 1d1ot.", "Fine.", "An idiot.", "You idiot."]


def test_the_lexicon_of_a_reward_leaves_out_the_insults_that_are_kept_from_it() -> None:
    seen, unseen = f"What a {SEEN_INSULTS[0]}.", f"What a {UNSEEN_INSULTS[0]}."
    assert lexicon_score(None)([PROMPT] * 2, [seen, unseen]).tolist() == [pytest.approx(1 / 3), 0.0]
    assert lexicon_score(re.compile("what", re.IGNORECASE))([PROMPT], [seen]).tolist() == [pytest.approx(1 / 3)]


def test_guarded_stands_for_its_terms_and_mixes_with_others() -> None:
    terms = parse_terms(["guarded", "length,maximum=40"])
    guard = ["classifier", "lexicon", "similarity", "copy", "repetition", "sameness"]
    assert [term.kind for term in terms] == [*guard, "length"]
    assert terms[:6] == parse_terms(GUARDED_TERMS)
    with pytest.raises(InputError, match="has the name classifier, as another term has"):
        parse_terms(["guarded", "classifier"])
