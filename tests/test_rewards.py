"""Scores: labels by name, probes, and the rules around a classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detoxrl.config import RewardConfig
from detoxrl.data.utterances import generate_utterances
from detoxrl.errors import InputError
from detoxrl.reward_training import train_reward_model
from detoxrl.rewards.classifier import Classifier, load_classifier
from detoxrl.rewards.shaping import Normaliser, fit_normaliser, shape_scores

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    losses: list[float] = []
    train_reward_model(
        generate_utterances(0, 3000), folder, steps=150, batch_size=64, lr=1e-3, seed=0, on_step=losses.append
    )
    assert losses[0] > 0.5 > 0.2 > losses[-1]
    return folder


@pytest.fixture(scope="module")
def classifier(reward_folder: Path) -> Classifier:
    return load_classifier(str(reward_folder), "nothate", "hate", CPU)


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


def test_labels_are_found_by_name_whatever_their_order(classifier: Classifier) -> None:
    swapped = Classifier(classifier.model, classifier.tokenizer, "HATE", "nothate")
    assert (swapped.good, swapped.toxic) == (1, 0)


@pytest.mark.parametrize(
    ("good", "toxic", "message"),
    [
        ("civil", "hate", r"reward\.good_label = 'civil'.*use one of nothate, hate"),
        ("nothate", "toxic", r"reward\.toxic_label = 'toxic'.*use one of nothate, hate"),
        ("nothate", "nothate", r"reward\.toxic_label = 'nothate': is the good label too"),
        ("hate", "nothate", r"scores a civil sentence .* no higher than a toxic one"),
    ],
)
def test_wrong_or_reversed_labels_are_bad_input(reward_folder: Path, good: str, toxic: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_classifier(str(reward_folder), good, toxic, CPU)


def test_a_missing_classifier_is_bad_input() -> None:
    with pytest.raises(InputError, match=r"reward\.classifier = '/nowhere'"):
        load_classifier("/nowhere", "nothate", "hate", CPU)


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
