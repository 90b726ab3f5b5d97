"""Each metric of a response against a second implementation of its definition, and against numbers by hand."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import prompted_rows
from detoxrl.evaluation.metrics import chrf, copied, distinct, response_metrics
from detoxrl.rewards.overlap import linear_sameness, sameness

ROWS = prompted_rows({"test": 40})["test"]
PAIRS = [
    ("The parcel came late.", "The parcel came late."),
    ("The parcel came late.", "the parcel was late!"),
    ("Они спорят о посылке.", "Они говорят о посылке и деньгах."),
    ("包裹来晚了，他们在争吵。", "包裹来晚了。"),
    ("a", "abcdefgh"), ("ab", "b"), ("", "a"), ("a", ""), ("a b c", "abc"),
    *((row.references[0], row.civil_references[0]) for row in ROWS),
    *((row.text, row.references[0]) for row in ROWS[:5]),
]  # fmt: skip
WORDS = ["a", "b", "B", "цвет", "été", "12", "."]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join) | st.text(max_size=30)
quick = settings(max_examples=80)


def character_grams(text: str, n: int) -> Counter[str]:
    characters = "".join(text.split())
    return Counter(characters[i : i + n] for i in range(len(characters) - n + 1))


def chrf_by_definition(reference: str, response: str) -> float:
    """chrF of Popović 2015 with beta 2: mean precision and mean recall over the orders that both texts have."""
    precisions = []
    recalls = []
    for n in range(1, 7):
        reference_grams, grams = (character_grams(text, n) for text in (reference, response))
        if reference_grams and grams:
            both = sum((reference_grams & grams).values())
            precisions.append(both / sum(grams.values()))
            recalls.append(both / sum(reference_grams.values()))
    if not sum(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * p * r / (4 * p + r)


BLOCKS = [
    *range(0x0E00, 0x0F00), *range(0x1000, 0x10A0), *range(0x1780, 0x1800), *range(0x3040, 0x3100),
    *range(0x3400, 0xA000), *range(0xF900, 0xFB00),
]  # fmt: skip
WITHOUT_SPACES = {chr(code) for code in BLOCKS}


def words(text: str) -> list[str]:
    """Letters and digits, one after the other: in scripts without spaces each is a word, elsewhere a run of them is."""
    found = [""]
    for character in text.casefold():
        is_part = character.isalnum() or character == "_"
        is_alone = character in WITHOUT_SPACES or 0x20000 <= ord(character) <= 0x3FFFF
        if is_part and is_alone:
            found += [character, ""]
        elif is_part:
            found[-1] += character
        else:
            found.append("")
    return [word for word in found if word]


def copied_by_definition(dialogue: str, response: str) -> float:
    response_words = words(response)
    dialogue_words = words(dialogue)
    n = min(4, len(response_words))
    novel = total = 0
    for i in range(len(response_words) - n + 1 if n else 0):
        gram = response_words[i : i + n]
        total += 1
        novel += not any(dialogue_words[j : j + n] == gram for j in range(len(dialogue_words)))
    return 1 - novel / total if total else 0.0


@pytest.mark.parametrize(("reference", "response"), PAIRS)
def test_chrf_is_that_of_its_formula_and_of_sacrebleus_corpora_of_one(reference: str, response: str) -> None:
    found = chrf(reference, response)
    assert found == pytest.approx(chrf_by_definition(reference, response), abs=1e-12)
    assert found == pytest.approx(sacrebleu.corpus_chrf([response], [[reference]]).score / 100, abs=1e-12)


def test_chrf_by_hand() -> None:
    # "abcd" against "abce": precision and recall 3/4, 2/3, 1/2 and 0
    assert chrf("abce", "abcd") == pytest.approx((3 / 4 + 2 / 3 + 1 / 2) / 4)
    # "ab" of "abcd": precision 1 and 1, recall 1/2 and 1/3, so that what was left out weighs more than what was added
    assert chrf("abcd", "ab") == pytest.approx(5 * (5 / 12) / (4 + 5 / 12))
    assert chrf("ab", "abcd") == pytest.approx(5 * (5 / 12) / (4 * 5 / 12 + 1))
    assert chrf("A b", "Ab") == 1.0
    assert chrf("a", "A") == chrf("a", "") == chrf("", "") == 0.0


def test_copied_by_hand() -> None:
    dialogue = "#Person1#: You are late, you clown! #Person2#: The parcel is at the door."
    assert copied(dialogue, "You are late, you clown") == 1.0
    # "the parcel is at", "parcel is at the" stand there; "is at the post" and "at the post office" do not
    assert copied(dialogue, "The parcel is at the post office.") == 0.5
    assert copied(dialogue, "late YOU") == 1.0  # fewer than four words are one n-gram
    assert copied(dialogue, "clown late") == 0.0
    assert copied(dialogue, "...") == copied(dialogue, "") == copied("", "") == 0.0
    assert copied("a b c d", "a b c d x a b c d") == pytest.approx(2 / 6)  # each time it occurs


def test_sameness_by_hand() -> None:
    # "a b c d" stands in one of two others, "b c d e" in none.
    assert sameness(["p", "q", "r"], ["A b c d e.", "a b c d", "x y z"]) == [pytest.approx(1 / 4), 0.5, 0.0]
    # Responses to the same prompt may be alike.
    assert sameness(["p", "p", "q"], ["a b c d"] * 2 + ["e"]) == [0.0, 0.0, 0.0]
    assert sameness(["p", "p", "q", "q"], ["a b", "c d", "a b", "e"]) == [0.5, 0.0, 0.5, 0.0]
    # One sentence for every prompt, or four that take turns.
    prompts = [str(number) for number in range(40)]
    assert sameness(prompts, ["Thank you, that is kind."] * 40) == [1.0] * 40
    turns = sameness(prompts, ["so it is", "be well", "oh", "I see what you mean here"] * 10)
    assert turns == pytest.approx([9 / 39] * 40)
    assert sameness(["p"], ["a b c d"]) == [0.0]
    assert sameness(["p", "q"], ["", "..."]) == [0.0, 0.0]
    assert sameness([], []) == []


prompted = st.tuples(st.sampled_from("pqr"), texts)


@given(st.lists(prompted, max_size=6), st.randoms(use_true_random=False))
@quick
def test_sameness_is_the_mean_of_what_is_copied_from_responses_to_other_prompts(
    responses: list[tuple[str, str]], rng: Random
) -> None:
    expected = []
    for prompt, text in responses:
        others = [copied_by_definition(other, text) for of, other in responses if of != prompt]
        expected.append(sum(others) / len(others) if others else 0.0)

    found = sameness([prompt for prompt, _ in responses], [text for _, text in responses])
    assert found == pytest.approx(expected, abs=1e-12)
    order = rng.sample(range(len(responses)), len(responses))
    shuffled = [responses[index] for index in order]
    again = sameness([prompt for prompt, _ in shuffled], [text for _, text in shuffled])
    assert again == [found[index] for index in order]


def test_linear_sameness_has_the_mean_of_sameness_and_the_spread_of_that_mean() -> None:
    # Sameness 1/4, 1/2 and 0; the first adds 1/2 to the second, the second 1/4 to the first; the mean is 1/4.
    responses = ["A b c d e.", "a b c d", "x y z"]
    assert linear_sameness(["p", "q", "r"], responses) == [pytest.approx(value) for value in (0.5, 0.5, -0.25)]
    assert linear_sameness([], []) == []
    assert linear_sameness(["p"], ["a b c d"]) == [0.0]

    # The standard error of the mean of 60 prompts, against the spread of such means themselves.
    rng = Random(0)
    means = []
    errors = []
    for _ in range(400):
        drawn = [rng.choice(["I see.", "I see.", "Thank you.", f"No {rng.random()}"]) for _ in range(60)]
        values = linear_sameness([str(number) for number in range(60)], drawn)
        means.append(statistics.fmean(values))
        errors.append(statistics.stdev(values) / 60**0.5)
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(means), rel=0.1)


@given(st.lists(prompted, min_size=1, max_size=6))
@quick
def test_linear_sameness_equals_its_definition(responses: list[tuple[str, str]]) -> None:
    def pair(one: int, other: int) -> float:
        """What the first response has of the second, over the number of responses to other prompts than the first's."""
        others = sum(prompt != responses[one][0] for prompt, _ in responses)
        if responses[one][0] == responses[other][0]:
            return 0.0
        return copied_by_definition(responses[other][1], responses[one][1]) / others

    rows = range(len(responses))
    own = [sum(pair(row, other) for other in rows) for row in rows]
    added = [sum(pair(other, row) for other in rows) for row in rows]
    expected = [own[row] + added[row] - sum(own) / len(own) for row in rows]
    found = linear_sameness([prompt for prompt, _ in responses], [text for _, text in responses])
    assert found == pytest.approx(expected, abs=1e-12)
    assert sum(found) == pytest.approx(sum(own), abs=1e-12)


def test_distinct_by_hand() -> None:
    # 8 words of which a, b, c, d differ; pairs within a sample: ab, bc, ab, ba, ab, (d alone), so ab, bc, ba of 5;
    # triples: abc, aba, bab
    found = distinct(["a b c", "A b. a, b", "d"])
    assert found == {"distinct_1": pytest.approx(4 / 8), "distinct_2": pytest.approx(3 / 5), "distinct_3": 1.0}
    assert distinct(["x y z", "x y z"])["distinct_3"] == 0.5
    assert distinct(["x", "x"]) == {"distinct_1": 0.5, "distinct_2": 0.0, "distinct_3": 0.0}
    assert distinct(["", "!"]) == distinct([]) == {"distinct_1": 0.0, "distinct_2": 0.0, "distinct_3": 0.0}
    assert distinct(["да нет", "да да"])["distinct_1"] == 0.5


@given(texts, texts)
@example("", "")
@quick
def test_chrf_and_copied_equal_their_definitions_on_any_text(one: str, other: str) -> None:
    assert chrf(one, other) == pytest.approx(chrf_by_definition(one, other), abs=1e-12)
    assert copied(one, other) == pytest.approx(copied_by_definition(one, other), abs=1e-12)
    assert 0 <= chrf(one, other) <= 1 + 1e-12
    assert 0 <= copied(one, other) <= 1
    assert chrf(one, one) == pytest.approx(float(bool(one.split())))
    assert copied(one, one) == copied(f"Well. {one}", one) == float(bool(words(one)))


@given(st.lists(texts, max_size=4))
@quick
def test_distinct_equals_its_definition_on_any_samples(samples: list[str]) -> None:
    found = distinct(samples)
    for n in (1, 2, 3):
        grams = [" ".join(words(text)[i : i + n]) for text in samples for i in range(len(words(text)) - n + 1)]
        assert found[f"distinct_{n}"] == pytest.approx(len(set(grams)) / len(grams) if grams else 0)
    assert distinct(samples[::-1]) == found
    assert distinct(samples * 2) == {name: pytest.approx(value / 2) for name, value in found.items()}


def test_response_metrics_have_chrf_where_rouge_is_and_copied_always() -> None:
    row = ROWS[0]
    assert row.civil_references[0]
    found = response_metrics(row, row.civil_references[0])
    assert (found["chrf"], found["rouge_l"]) == (1.0, 1.0)
    assert found["copied"] == pytest.approx(copied_by_definition(row.text, row.civil_references[0]), abs=1e-12)
    assert response_metrics(row, row.text)["copied"] == 1.0
    plain = replace(row, civil_references=(), references=("It is late.",))
    assert response_metrics(plain, "It was late.")["chrf"] == chrf("It is late.", "It was late.")
    bare = response_metrics(replace(row, civil_references=(), references=()), "x")
    assert "copied" in bare
    assert not {"chrf", "rouge_l"} & set(bare)
