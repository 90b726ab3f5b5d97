"""How a classifier is fitted: losses by hand, batches, early stopping, and that tiny encoders learn."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest
import torch

from detoxrl.config.edit import fit_config
from detoxrl.data.held_out import divide
from detoxrl.data.labelled import read_labelled
from detoxrl.errors import TrainingError
from detoxrl.models.encoder import load_under_new_head, with_lora
from detoxrl.rewards import fitting
from detoxrl.rewards.fitting import (
    Encoded,
    Encoder,
    FitData,
    Objective,
    Trained,
    balancing_weights,
    example_losses,
    fit_classifier,
    predict,
)
from encoders import labelled_rows, make_encoder, pair_rows, write_rows

NAN = math.nan


def test_losses_have_the_values_computed_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [1.0, 2.0]])
    scores = example_losses(logits, torch.tensor([[0.25, 1.0], [NAN, 0.0]]), "scores")
    assert scores.tolist() == [
        [pytest.approx(math.log(2)), pytest.approx(-math.log(0.75))],
        [0.0, pytest.approx(-math.log(1 / (1 + math.exp(2))), rel=1e-6)],
    ]
    classes = example_losses(logits, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "classes")
    assert classes.tolist() == [[0, pytest.approx(-math.log(0.75))], [pytest.approx(math.log(1 + math.e)), 0]]
    # Two pairs: chosen less rejected are log 3 and -2.
    pairs = example_losses(torch.tensor([[math.log(3)], [0.0], [1.0], [3.0]]), torch.ones(2, 1), "pairs")
    assert pairs.tolist() == [[pytest.approx(-math.log(0.75))], [pytest.approx(math.log(1 + math.exp(2)))]]


def encoded(targets: list[list[float]], lengths: list[int] | None = None) -> Encoded:
    ids = [[0] * length for length in lengths or [1] * len(targets)]
    return Encoded(ids, torch.tensor(targets), 1, 0)


def test_balanced_sides_and_classes_have_the_same_weight() -> None:
    # One of four is positive, and half of the soft labels' mass.
    low, high = balancing_weights(torch.tensor([[1.0, 0.2], [0.0, 0.8], [0.0, NAN], [0.0, 0.5]]), "scores")
    assert low.tolist() == [pytest.approx(2 / 3), 1]
    assert high.tolist() == [2, 1]
    _, classes = balancing_weights(torch.eye(3)[[0, 0, 0, 1, 1, 2]], "classes")
    assert classes.tolist() == [pytest.approx(2 / 3), 1, 2]

    training = encoded([[1.0], [0.0], [0.0], [0.0]])
    logits = torch.tensor([[0.0], [math.log(3)], [0.0], [0.0]])
    plain = Objective(training, "scores", balance=False)(logits, training.targets)
    assert float(plain) == pytest.approx((3 * math.log(2) + math.log(4)) / 4)
    balanced = Objective(training, "scores", balance=True)(logits, training.targets)
    assert float(balanced) == pytest.approx((2 * math.log(2) + 2 / 3 * (2 * math.log(2) + math.log(4))) / 4)


def test_the_loss_is_a_mean_over_the_labels_that_are_known() -> None:
    targets = torch.tensor([[1.0, NAN], [NAN, 0.0], [1.0, 1.0]])
    objective = Objective(Encoded([], targets, 1, 0), "scores", balance=False)
    assert float(objective(torch.zeros(3, 2), targets)) == pytest.approx(math.log(2))


def test_every_pass_reads_each_example_once_in_batches_of_similar_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_SORTED_BATCHES", 5)
    lengths = np.random.default_rng(0).integers(1, 100, 103).tolist()
    examples = encoded([[1.0]] * 103, lengths)
    batches = fitting._Batches(examples, fit_config({"source": "x", "batch_size": 10}))
    passes = [[batches.rows(step) for step in range(start, start + 11)] for start in (0, 11)]
    for of_pass in passes:
        assert sorted(row for rows in of_pass for row in rows) == list(range(103))
        assert sorted(map(len, of_pass)) == [3] + [10] * 10
        spread = [max(lengths[row] for row in rows) - min(lengths[row] for row in rows) for rows in of_pass]
        assert np.mean(spread) < 30  # Of 10 at random it would be 80.
    assert passes[0] != passes[1]
    # A step's batch does not depend on the steps before it.
    again = fitting._Batches(examples, fit_config({"source": "x", "batch_size": 10}))
    assert again.rows(15) == passes[1][4]


def test_of_a_pair_the_longer_text_counts() -> None:
    assert [Encoded([[0] * n for n in (3, 9, 4, 2)], torch.ones(2, 1), 2, 0).length(pair) for pair in (0, 1)] == [9, 4]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: make_encoder(kind, root / kind) for kind in ("bert", "roberta")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        "labels": write_rows(root / "labels.jsonl", labelled_rows(600)),
        "pairs": write_rows(root / "pairs.jsonl", pair_rows(300)),
    }


def fitted(encoder: Path, source: Path, work: Path, **settings: Any) -> tuple[Trained, Any, FitData, Encoded]:
    """Return how training went, the model, its data and the encoded test examples."""
    config = fit_config({"source": source, "batch_size": 16, **settings})
    labelled = read_labelled(config)
    division = divide(labelled, config)
    model: Any
    model, tokenizer = load_under_new_head(str(encoder), "encoder", labelled.labels, 1)
    if config.lora_rank:
        model = with_lora(model, config.lora_rank, str(encoder), 2)
    reads = Encoder(tokenizer, 64)
    data = FitData(labelled.kind, reads, reads.encode(division.train), reads.encode(division.validation))
    trained = fit_classifier(model, data, config, work, lambda done, loss: None)
    return trained, model, data, reads.encode(division.test)


def share_correct(logits: torch.Tensor, test: Encoded, kind: str) -> float:
    if kind == "pairs":
        correct = logits[0::2] > logits[1::2]
    elif kind == "classes":
        correct = logits.argmax(1) == test.targets.argmax(1)
    else:
        correct = (logits > 0) == (test.targets > 0.5)
    return float(correct.float().mean())


WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"label_columns": "tone", "lr": 3e-3, "epochs": 3}),
    ("roberta", {"label_columns": ["score", "rude"], "lr": 3e-3, "epochs": 3, "balance": True}),
    ("bert", {"chosen_column": "better", "rejected_column": "worse", "lr": 3e-3, "epochs": 4}),
]


@pytest.mark.parametrize(("kind", "settings"), WHOLE, ids=["classes", "several scores", "pairs"])
def test_a_random_encoder_learns_with_all_its_weights(
    encoders: dict[str, Path], sources: dict[str, Path], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    source = sources["pairs" if "chosen_column" in settings else "labels"]
    trained, model, data, test = fitted(encoders[kind], source, tmp_path, **settings)
    assert trained.history[-1]["validation_loss"] < trained.history[0]["validation_loss"]
    assert share_correct(predict(model, data.encoder, test), test, data.kind) > 0.9


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_trained_encoder_learns_with_a_lora(
    encoders: dict[str, Path], sources: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    source = sources["labels"]
    _, model, data, _ = fitted(encoders[kind], source, tmp_path / "whole", label_columns="rude", lr=3e-3, epochs=3)
    model.base_model.save_pretrained(tmp_path / "encoder")
    data.encoder.tokenizer.save_pretrained(tmp_path / "encoder")

    settings = {"label_columns": "score", "lr": 3e-3, "epochs": 1, "lora_rank": 8}
    _, adapted, data, test = fitted(tmp_path / "encoder", source, tmp_path / "lora", **settings)
    assert share_correct(predict(adapted, data.encoder, test), test, data.kind) > 0.9
    for name, weight in adapted.named_parameters():
        assert "lora_B" not in name or weight.any(), name


Seen = list[dict[str, torch.Tensor]]


def validate_with(losses: list[float], monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Let validations have these losses, one after the other; return the list that their weights will be in."""
    seen: Seen = []

    def given(model: Any, encoder: Encoder, examples: Encoded) -> torch.Tensor:
        loss = torch.tensor(losses[len(seen)])
        seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        # A logit with this loss for a target of 1: -log sigmoid(z) = loss.
        return (-(loss.exp() - 1).log()).expand(len(examples), 1)

    loss_of_one = torch.nn.functional.logsigmoid
    monkeypatch.setattr(fitting, "predict", given)
    monkeypatch.setattr(fitting, "example_losses", lambda logits, targets, kind: -loss_of_one(logits))
    return seen


def test_the_weights_of_the_lowest_validation_loss_are_kept_and_training_stops_early(
    encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = validate_with([0.7, 0.5, 0.6, 0.5, 0.4, 0.3], monkeypatch)
    rows = write_rows(tmp_path / "rows.jsonl", labelled_rows(300))
    settings = {"label_columns": "rude", "validate_every": 2, "patience": 2, "epochs": 5}
    trained, model, _, _ = fitted(encoders["bert"], rows, tmp_path / "work", **settings)
    assert [record["step"] for record in trained.history] == [2, 4, 6, 8]
    assert [record["validation_loss"] for record in trained.history] == pytest.approx([0.7, 0.5, 0.6, 0.5], abs=1e-6)
    assert (trained.steps, trained.best_step) == (8, 4)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, seen[1][name])
    assert any(not torch.equal(seen[1][name], weight) for name, weight in seen[3].items())


def test_a_checkpoint_holds_the_weights_of_the_lowest_validation_loss(
    encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = validate_with([0.4, 0.6, 0.7], monkeypatch)
    rows = write_rows(tmp_path / "rows.jsonl", labelled_rows(300))
    settings = {"label_columns": "rude", "validate_every": 2, "patience": 2, "epochs": 5}
    rate = fitting._learning_rate

    def stop(step: int, planned: int, config: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return rate(step, planned, config)

    monkeypatch.setattr(fitting, "_learning_rate", lambda *given: stop(*given) if given[0] == 3 else rate(*given))
    with pytest.raises(KeyboardInterrupt):
        fitted(encoders["bert"], rows, tmp_path / "work", **settings)
    monkeypatch.setattr(fitting, "_learning_rate", rate)
    rmtree(tmp_path / "work/best")

    trained, model, _, _ = fitted(encoders["bert"], rows, tmp_path / "work", **settings)
    assert [record["step"] for record in trained.history] == [2, 4, 6]
    assert trained.best_step == 2
    for name, weight in model.named_parameters():
        assert torch.equal(weight, seen[0][name])


def test_predictions_do_not_depend_on_the_batch(encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_under_new_head(str(encoders["roberta"]), "encoder", ("a", "b"), 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)  # So that neighbours and padding would show.
    examples = Encoded([tokenizer("you rat " * n).input_ids for n in (9, 1, 5, 30)], torch.ones(4, 2), 1, 0)
    whole = predict(model, Encoder(tokenizer, 64), examples)
    monkeypatch.setattr(fitting, "tokens_at_once", lambda device: 1)
    torch.testing.assert_close(whole, predict(model, Encoder(tokenizer, 64), examples), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        alone = model.eval()(torch.tensor([examples.ids[2]])).logits
    torch.testing.assert_close(whole[2:3], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0], whole[2], rtol=1e-2)


def test_texts_beyond_the_limit_are_cut_and_counted(encoders: dict[str, Path], sources: dict[str, Path]) -> None:
    _, tokenizer = load_under_new_head(str(encoders["bert"]), "encoder", ("a",), 1)
    config = fit_config({"source": sources["labels"], "label_columns": "rude"})
    examples = read_labelled(config).examples[:40]
    lengths = [len(tokenizer(example.texts[0]).input_ids) for example in examples]
    limit = sorted(lengths)[20]
    cut = Encoder(tokenizer, limit).encode(examples)
    assert list(map(len, cut.ids)) == [min(length, limit) for length in lengths]
    assert cut.cut == sum(length > limit for length in lengths) > 0
    assert all(ids[-1] == tokenizer.eos_token_id for ids in cut.ids)


def test_a_loss_that_is_not_finite_ends_the_fit_with_its_remedy(
    encoders: dict[str, Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"fit stopped at step \d+: the loss is nan; a learning rate below --lr"):
        fitted(encoders["bert"], sources["labels"], tmp_path, label_columns="rude", lr=1e30, epochs=1)
