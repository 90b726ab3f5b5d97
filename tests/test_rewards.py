"""Scores: labels by name, probes, and the rules around a classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detoxrl.config import RewardConfig
from detoxrl.errors import InputError
from detoxrl.rewards.classifier import Classifier, load_classifier
from detoxrl.rewards.shaping import Normaliser, fit_normaliser, shape_scores

CPU = torch.device("cpu")
LABELS = {"reward.toxic_label": "hate", "reward.good_label": "nothate"}


@pytest.fixture(scope="module")
def classifier(reward_folder: Path) -> Classifier:
    return load_classifier(str(reward_folder), "reward.classifier", LABELS, CPU)


def test_the_score_is_the_raw_good_logit_of_the_response_alone(classifier: Classifier) -> None:
    texts = ["You are a stupid pig.", "That sounds fair."]
    batch = classifier.tokenizer(texts, return_tensors="pt", padding=True)
    logits = classifier.model(**batch).logits.detach()
    scores = classifier.score(["You idiot!", "Hello."], texts)
    torch.testing.assert_close(scores, logits[:, 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(scores, classifier.score(["other", "prompts"], texts))
    torch.testing.assert_close(classifier.toxicity(texts), logits.softmax(-1)[:, 1], rtol=1e-5, atol=1e-6)
    assert scores[1] > scores[0] + 1


def test_batch_size_and_repetition_change_no_score(classifier: Classifier) -> None:
    texts = ["Fine.", "You are a worthless rat because the soup was cold.", "Fine.", "Good, thank you."]
    torch.testing.assert_close(
        classifier.logits(texts, batch_size=1), classifier.logits(texts, batch_size=9), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(classifier.logits(texts)[0], classifier.logits(texts)[2])


def test_labels_are_found_by_name_whatever_their_case(reward_folder: Path) -> None:
    labels = {"reward.toxic_label": "HATE", "reward.good_label": "NotHate"}
    found = load_classifier(str(reward_folder), "reward.classifier", labels, CPU)
    assert (found.good, found.toxic) == (0, 1)


@pytest.mark.parametrize(
    ("good", "toxic", "message"),
    [
        ("civil", "hate", r"reward\.good_label = 'civil'.*use one of nothate, hate"),
        ("nothate", "toxic", r"reward\.toxic_label = 'toxic'.*use one of nothate, hate"),
        ("nothate", "nothate", r"reward\.toxic_label = 'nothate': is reversed: probability \d\.\d\d for a civil"),
        ("hate", "nothate", r"reward\.good_label = 'hate': is reversed: probability \d\.\d\d for a civil sentence"),
    ],
)
def test_wrong_or_reversed_labels_are_bad_input(reward_folder: Path, good: str, toxic: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_classifier(
            str(reward_folder), "reward.classifier", {"reward.toxic_label": toxic, "reward.good_label": good}, CPU
        )


def test_labels_that_may_hold_at_once_have_a_probability_each(classifier: Classifier) -> None:
    texts = ["You are a stupid pig.", "Fine."]
    logits = classifier.logits(texts)
    torch.testing.assert_close(classifier.probabilities(texts), logits.softmax(-1))
    try:
        classifier.model.config.problem_type = "multi_label_classification"
        torch.testing.assert_close(classifier.probabilities(texts), logits.sigmoid())
    finally:
        classifier.model.config.problem_type = None


def test_a_text_longer_than_the_positions_is_cut_to_them(classifier: Classifier) -> None:
    # 514 positions, counted from the padding index 0 on; the tokenizer itself knows no limit.
    assert classifier.max_length == 512
    classifier.model.config.max_position_embeddings = 20
    try:
        assert Classifier(classifier.model, classifier.tokenizer, 1, 0).max_length == 19
    finally:
        classifier.model.config.max_position_embeddings = 514
    assert classifier.logits(["pig " * 2000]).isfinite().all()


def test_a_missing_classifier_is_bad_input() -> None:
    with pytest.raises(InputError, match=r"reward\.classifier = '/nowhere'"):
        load_classifier("/nowhere", "reward.classifier", LABELS, CPU)


def test_scores_are_normalised_clipped_and_ruled_by_hand() -> None:
    config = RewardConfig(clip=2.0, missing_eos_penalty=0.5, empty_score=-5.0)
    raw = torch.tensor([3.0, 3.0, 100.0, 3.0, 3.0])
    ended = torch.tensor([True, False, True, True, True])
    scores = shape_scores(raw, ["a", "b", "c", "", " ."], ended, Normaliser(mean=1.0, std=2.0), config)
    assert scores.tolist() == [1.0, 0.5, 2.0, -5.0, -5.0]


def test_the_normaliser_takes_mean_and_sample_std_and_survives_a_constant() -> None:
    found = fit_normaliser(torch.tensor([1.0, 3.0]))
    assert (found.mean, found.std) == (2.0, pytest.approx(2**0.5))
    assert fit_normaliser(torch.full((4,), 3.0)).std == 1.0
    assert fit_normaliser(torch.tensor([1.0, 1.0 + 1e-4])).std == pytest.approx(1e-4 / 2**0.5, rel=1e-2)
