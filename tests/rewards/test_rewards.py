"""Scores of a classifier: its labels, how it reads texts, and how its outputs become scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from detoxrl.config.recipes import recipe
from detoxrl.errors import InputError
from detoxrl.models.loading import load_tokenizer
from detoxrl.rewards.classifier import Classifier, class_scores, load_classifier
from detoxrl.rewards.shaping import Normaliser, fit_normaliser, shape_scores

CPU = torch.device("cpu")
TOXIC = {"reward.toxic_label": "hate"}
GOOD = {"reward.good_label": "nothate"}


@pytest.fixture(scope="module")
def classifier(reward_folder: Path) -> Classifier:
    return load_classifier(str(reward_folder), "reward.classifier", TOXIC, CPU, GOOD)


def test_the_score_is_the_raw_good_logit_of_the_response_alone(classifier: Classifier) -> None:
    texts = ["You are a stupid pig.", "That sounds fair."]
    batch = classifier.tokenizer(texts, return_tensors="pt", padding=True)
    logits = classifier.model(**batch).logits.detach()
    scores = classifier.score(["You idiot!", "Hello."], texts)
    torch.testing.assert_close(scores, logits[:, 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(scores, classifier.score(["other", "prompts"], texts))
    torch.testing.assert_close(classifier.toxicity(texts), logits.softmax(-1)[:, 1], rtol=1e-5, atol=1e-6)
    assert scores[1] > scores[0] + 1


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def random_classifier(request: pytest.FixtureRequest, classifier: Classifier) -> Classifier:
    """A classifier with weights so large that attention to padding, or to a neighbour, would change its logits."""
    torch.manual_seed(3)
    shape: dict[str, Any] = {"vocab_size": len(classifier.tokenizer), "pad_token_id": 0, "initializer_range": 0.5}
    encoder = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model: Any = {
        "bert": lambda: BertForSequenceClassification(BertConfig(**shape, **encoder)),
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**shape, **encoder)),
        "distilbert": lambda: DistilBertForSequenceClassification(
            DistilBertConfig(**shape, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
        ),
    }[request.param]()
    return Classifier(model, classifier.tokenizer, 1, 0)


@contextmanager
def batch_shapes(classifier: Classifier) -> Iterator[list[tuple[int, int]]]:
    """Collect the shape (texts, tokens) of each batch that the model reads."""
    shapes: list[tuple[int, int]] = []
    hook = classifier.model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


WORDS = ["soup", "fine", "you", "are", "a", "stupid", "rat", "because", "cold", "thank", "good", "late", "today"]
SENTENCES = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join), min_size=1, max_size=8)


@given(texts=SENTENCES, tokens=st.integers(1, 600))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_neither_batch_nor_neighbours_change_a_probability(
    random_classifier: Classifier, texts: list[str], tokens: int
) -> None:
    model, tokenizer = random_classifier.model, random_classifier.tokenizer
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(
        random_classifier.logits(texts, tokens).softmax(-1), alone.softmax(-1), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(random_classifier.probabilities(texts), alone.softmax(-1), rtol=0, atol=1e-5)


def test_each_distinct_text_is_read_once_in_a_batch_of_similar_length(classifier: Classifier) -> None:
    texts = ["rat " * count for count in (30, 1, 30, 2, 31, 1, 200, 2, 3)]
    widths = sorted(len(ids) for ids in classifier.tokenizer(list(set(texts))).input_ids)
    with batch_shapes(classifier) as shapes:
        logits = classifier.logits(texts, tokens=2 * widths[4])
    assert shapes == [(3, widths[2]), (2, widths[4]), (1, widths[5])]
    assert torch.equal(logits[0], logits[2])
    with batch_shapes(classifier) as shapes:
        torch.testing.assert_close(classifier.logits(texts[::-1]), logits.flip(0), rtol=1e-5, atol=1e-5)
    assert sum(rows for rows, _ in shapes) == 6


def test_a_pair_is_read_as_premise_and_hypothesis(random_classifier: Classifier) -> None:
    model, tokenizer = random_classifier.model, random_classifier.tokenizer
    pairs = [("the soup was cold", "you are late"), ("fine", "you rat"), ("you rat", "fine"), ("fine", "you rat")]
    with batch_shapes(random_classifier) as shapes:
        logits = random_classifier.logits(pairs)
    assert sum(rows for rows, _ in shapes) == 3
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer(*pair, return_tensors="pt")).logits for pair in pairs])
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(random_classifier.probabilities(pairs), alone.softmax(-1), rtol=0, atol=1e-5)
    assert not torch.allclose(logits[1], logits[2])


def test_the_longer_text_of_a_pair_is_cut_first(classifier: Classifier) -> None:
    read: list[list[int]] = []
    hook = classifier.model.register_forward_pre_hook(
        lambda _, __, kwargs: read.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    classifier.logits([("soup " * 2000, "late " * 100)])
    hook.remove()
    hypothesis = classifier.tokenizer("late " * 100, add_special_tokens=False).input_ids
    assert len(read[0]) == classifier.max_length
    assert " ".join(map(str, hypothesis)) in " ".join(map(str, read[0]))


def test_autocast_applies_to_the_classifier(classifier: Classifier) -> None:
    texts = ["Fine.", "You are a worthless rat because the soup was cold."]
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier.logits(texts)
    torch.testing.assert_close(logits, classifier.logits(texts), rtol=0.1, atol=0.1)


def test_labels_are_found_by_name_in_any_case(reward_folder: Path) -> None:
    toxic, good = {"reward.toxic_label": "HATE"}, {"reward.good_label": "NotHate"}
    classifier = load_classifier(str(reward_folder), "reward.classifier", toxic, CPU, good)
    assert (classifier.good, classifier.toxic) == (0, 1)


@pytest.mark.parametrize(
    ("good", "toxic", "message"),
    [
        ("civil", "hate", r"reward\.good_label = 'civil'.*use one of nothate, hate"),
        ("nothate", "toxic", r"reward\.toxic_label = 'toxic'.*use one of nothate, hate"),
        ("nothate", "nothate", r"reward\.good_label = 'nothate': is the label of reward\.toxic_label too; "),
        ("hate", "nothate", r"reward\.good_label = 'hate': is reversed: probability \d\.\d\d for a civil sentence"),
    ],
)
def test_wrong_or_reversed_labels_are_bad_input(reward_folder: Path, good: str, toxic: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_classifier(
            str(reward_folder), "reward.classifier", {"reward.toxic_label": toxic}, CPU, {"reward.good_label": good}
        )


def test_a_term_may_name_its_labels_by_settings_of_its_own(reward_folder: Path) -> None:
    toxic, good = {"reward.terms own, toxic_label": "hate"}, {"reward.terms own, good_label": "nothate"}
    classifier = load_classifier(str(reward_folder), "reward.terms own", toxic, CPU, good)
    assert (classifier.good, classifier.toxic) == (0, 1)
    torch.testing.assert_close(classifier.score([""], ["Fine."]), classifier.logits(["Fine."])[:, 0])

    alone = load_classifier(str(reward_folder), "reward.terms own", {}, CPU, good)
    assert (alone.good, alone.toxic) == (0, None)
    with pytest.raises(InputError, match=r"reward\.terms own, good_label = 'hate': is reversed.*that means civil"):
        load_classifier(str(reward_folder), "reward.terms own", {}, CPU, {"reward.terms own, good_label": "hate"})


def test_each_label_of_a_multi_label_classifier_has_its_own_probability(classifier: Classifier) -> None:
    texts = ["You are a stupid pig.", "Fine."]
    logits = classifier.logits(texts)
    torch.testing.assert_close(classifier.probabilities(texts), logits.softmax(-1))
    try:
        classifier.model.config.problem_type = "multi_label_classification"
        torch.testing.assert_close(classifier.probabilities(texts), logits.sigmoid())
    finally:
        classifier.model.config.problem_type = None


def limit_of(classifier: Classifier, positions: int, stated: float = 1e30) -> int:
    """Return the limit of texts for a model of so many positions and a tokenizer that states a limit."""
    config, tokenizer = classifier.model.config, classifier.tokenizer
    before = config.max_position_embeddings, tokenizer.model_max_length
    config.max_position_embeddings, tokenizer.model_max_length = positions, int(stated)
    try:
        return Classifier(classifier.model, tokenizer, 1, 0).max_length
    finally:
        config.max_position_embeddings, tokenizer.model_max_length = before


def test_a_limit_that_the_tokenizer_states_is_honoured(classifier: Classifier) -> None:
    assert limit_of(classifier, positions=2048, stated=1024) == 1024
    assert limit_of(classifier, positions=2048, stated=64) == 64
    assert limit_of(classifier, positions=514, stated=1024) == 513
    assert limit_of(classifier, positions=2048) == 512


def test_a_text_longer_than_the_positions_is_cut_to_them(classifier: Classifier) -> None:
    # RoBERTa's 514 positions start after the padding id 0 and the tokenizer has no limit of its own, so 513 are left;
    # the classifier reads at most 512.
    assert classifier.max_length == 512
    assert limit_of(classifier, positions=20) == 19
    assert classifier.logits(["pig " * 2000]).isfinite().all()


def test_a_missing_classifier_is_bad_input() -> None:
    with pytest.raises(InputError, match=r"reward\.classifier = '/nowhere'"):
        load_classifier("/nowhere", "reward.classifier", TOXIC, CPU, GOOD)


def test_scores_are_normalised_clipped_and_penalised() -> None:
    settings = {"reward.clip": 2.0, "reward.missing_eos_penalty": 0.5, "reward.empty_score": -5.0}
    config = recipe("own", settings)
    raw = torch.tensor([[3.0], [3.0], [100.0], [3.0], [3.0]])
    ended = torch.tensor([True, False, True, True, True])
    scores = shape_scores(raw, ["a", "b", "c", "", " ."], ended, Normaliser(means=(1.0,), stds=(2.0,)), config)
    assert scores.tolist() == [1.0, 0.5, 2.0, -5.0, -5.0]


def test_the_normaliser_is_mean_and_sample_std_and_keeps_std_1_for_equal_scores() -> None:
    (term,) = recipe("own").reward.measured_terms

    def fitted(values: list[float]) -> Normaliser:
        return fit_normaliser(torch.tensor(values)[:, None], [term])

    assert fitted([1.0, 3.0]) == Normaliser(means=(2.0,), stds=(pytest.approx(2**0.5),))
    assert fitted([3.0] * 4).stds == (1.0,)
    assert fitted([1.0, 1.0 + 1e-4]).stds == (pytest.approx(1e-4 / 2**0.5, rel=1e-2),)


def test_each_kind_of_score_has_the_value_computed_by_hand() -> None:
    # Two labels under a softmax: P(good) = 1 / (1 + e^-3), log-odds 3.
    logits = torch.tensor([[2.0, -1.0]])
    p = 1 / (1 + math.exp(-3))
    wanted = {"logit": 2.0, "log_odds": 3.0, "log_probability": math.log(p), "probability": p, "not_toxicity": p}
    for kind, value in wanted.items():
        assert float(class_scores(logits, kind, toxic=1, good=0, multi_label=False)) == pytest.approx(value, rel=1e-6)
    # Three labels under a softmax: P(good) = e^2 / (e^2 + e^-1 + 1), P(toxic) = e^-1 / (e^2 + e^-1 + 1).
    three, total = torch.tensor([[2.0, -1.0, 0.0]]), math.exp(2) + math.exp(-1) + 1
    good, toxic = math.exp(2) / total, math.exp(-1) / total
    wanted = {"logit": 2.0, "log_odds": math.log(good / (1 - good)), "log_probability": math.log(good),
              "probability": good, "not_toxicity": 1 - toxic}  # fmt: skip
    for kind, value in wanted.items():
        assert float(class_scores(three, kind, toxic=1, good=0, multi_label=False)) == pytest.approx(value, rel=1e-6)
    # No good label, and a sigmoid for each label, as in unitary/toxic-bert: the logit of the toxic label is -1.
    civil = 1 - 1 / (1 + math.exp(1))
    wanted = {"logit": 1.0, "log_odds": 1.0, "log_probability": math.log(civil), "probability": civil,
              "not_toxicity": civil}  # fmt: skip
    for kind, value in wanted.items():
        assert float(class_scores(three, kind, toxic=1, good=None, multi_label=True)) == pytest.approx(value, rel=1e-6)


def test_probabilities_saturate_where_log_odds_and_logits_do_not() -> None:
    logits = torch.tensor([[20.0, -20.0], [30.0, -30.0]])
    for kind in ("probability", "not_toxicity"):
        low, high = class_scores(logits, kind, toxic=1, good=0, multi_label=False)
        assert float(high - low) == 0.0
    for kind, gap in {"logit": 10.0, "log_odds": 20.0}.items():
        low, high = class_scores(logits, kind, toxic=1, good=0, multi_label=False)
        assert float(high - low) == gap
    # A log-probability saturates for civil texts only.
    low, high = class_scores(-logits, "log_probability", toxic=1, good=0, multi_label=False)
    assert float(low - high) == 20.0


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=5).map(lambda row: torch.tensor([row])),
    st.booleans(),
)
def test_every_score_of_the_good_label_rises_with_its_logit(logits: torch.Tensor, multi_label: bool) -> None:
    raised = logits.clone()
    raised[0, 0] += 0.5
    for kind in ("logit", "log_odds", "log_probability", "probability"):
        before, after = (class_scores(x, kind, toxic=1, good=0, multi_label=multi_label) for x in (logits, raised))
        assert float(after) > float(before)
    p = logits.sigmoid() if multi_label else logits.softmax(-1)
    toxicity = 1 - class_scores(logits, "not_toxicity", toxic=1, good=0, multi_label=multi_label)
    torch.testing.assert_close(toxicity, p[:, 1], rtol=1e-4, atol=1e-6)


def test_a_classifier_without_a_good_label_scores_one_minus_toxicity(reward_folder: Path) -> None:
    texts = ["You are a stupid pig.", "That sounds fair."]
    toxic_only = load_classifier(str(reward_folder), "reward.classifier", TOXIC, CPU, kind="not_toxicity")
    assert toxic_only.good is None
    torch.testing.assert_close(toxic_only.score(["", ""], texts), 1 - toxic_only.toxicity(texts))
    odds = load_classifier(str(reward_folder), "reward.classifier", TOXIC, CPU, GOOD, "log_odds").score(["", ""], texts)
    logits = toxic_only.logits(texts)
    torch.testing.assert_close(odds, logits[:, 0] - logits[:, 1], rtol=1e-5, atol=1e-5)


# Texts and models that are odd


def test_the_name_of_a_special_token_in_a_text_is_text(classifier: Classifier) -> None:
    tokenizer = classifier.tokenizer
    odd = f"Fine {tokenizer.eos_token} bye."
    ends_of_others = tokenizer("Fine.").input_ids.count(tokenizer.eos_token_id)
    assert tokenizer(odd).input_ids.count(tokenizer.eos_token_id) == ends_of_others + 1
    (read,) = classifier._encoded([odd]).values()
    assert read["input_ids"].count(tokenizer.eos_token_id) == ends_of_others
    assert len(read["input_ids"]) > len(tokenizer(odd).input_ids)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_without_tokens_is_read_as_an_end_alone(family: str, bases: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(bases["gpt2"]))
    assert tokenizer("").input_ids == []
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = {
        "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=1, n_head=4, **shape)),
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, **shape)),
    }[family]()  # fmt: skip
    reader = Classifier(model, tokenizer, 1, 0)
    alone = reader.logits([""])
    assert alone.shape == (1, 2)
    torch.testing.assert_close(reader.logits(["Good day to you.", "", "Hello."])[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone, reader.logits(["Hello."]))


def regression(classifier: Classifier, folder: Path, scale: float, shift: float) -> Path:
    """Save a classifier with one output: `scale` times the log-odds of toxic, plus `shift`, as a regression."""
    model = copy.deepcopy(classifier.model)
    out = model.classifier.out_proj
    new = torch.nn.Linear(out.in_features, 1)
    with torch.no_grad():
        new.weight.copy_(scale * (out.weight[1] - out.weight[0])[None])
        new.bias.copy_(scale * (out.bias[1] - out.bias[0])[None] + shift)
    model.classifier.out_proj = new
    model.config.num_labels = 1
    model.config.problem_type = "regression"
    model.config.id2label = {0: "toxicity"}
    model.config.label2id = {"toxicity": 0}
    model.save_pretrained(folder)
    classifier.tokenizer.save_pretrained(folder)
    return folder


def test_the_output_of_a_regression_is_the_probability(classifier: Classifier, tmp_path: Path) -> None:
    folder = regression(classifier, tmp_path / "judge", scale=0.05, shift=0.5)
    texts = ["You are a stupid pig.", "That sounds fair."]
    judge = load_classifier(str(folder), "evaluation.primary_judge", {"evaluation.judge_label": "toxicity"}, CPU)
    outputs = judge.logits(texts)[:, 0]
    assert bool((outputs > 0).all())
    assert bool((outputs < 1).all())
    torch.testing.assert_close(judge.toxicity(texts), outputs)
    assert outputs[0] > outputs[1]

    reward = load_classifier(
        str(folder), "reward.classifier", {"reward.toxic_label": "toxicity"}, CPU, kind="not_toxicity"
    )
    torch.testing.assert_close(reward.score(texts, texts), 1 - outputs)
    reward.kind = "log_odds"
    torch.testing.assert_close(reward.score(texts, texts), -torch.logit(outputs))


def test_what_a_regression_exceeds_0_and_1_by_is_cut_or_refused(classifier: Classifier, tmp_path: Path) -> None:
    texts = ["You are a stupid pig.", "That sounds fair."]
    raw = load_classifier(str(regression(classifier, tmp_path / "raw", 0.05, 0.5)), "reward.classifier",
                          {"reward.toxic_label": "toxicity"}, CPU).logits(texts)[:, 0]  # fmt: skip
    shift = 0.5 - float(raw.min()) - 0.1
    label = {"evaluation.judge_label": "toxicity"}
    judge = load_classifier(str(regression(classifier, tmp_path / "low", 0.05, shift)), "judge", label, CPU)
    assert float(judge.logits(texts).min()) < 0
    assert float(judge.toxicity(texts).min()) == pytest.approx(1e-6, rel=0.1)
    with pytest.raises(
        InputError, match=r"judge = '.*': is a regression whose outputs, .*, are no probabilities; remove"
    ):
        load_classifier(str(regression(classifier, tmp_path / "wide", 1.0, 0.0)), "judge", label, CPU)


def test_a_regression_with_a_good_label_is_a_scorer_without_bounds(classifier: Classifier, tmp_path: Path) -> None:
    folder = regression(classifier, tmp_path / "scorer", scale=-1.0, shift=0.0)
    scorer = load_classifier(str(folder), "reward.classifier", {}, CPU, {"reward.good_label": "toxicity"})
    texts = ["You are a stupid pig.", "That sounds fair."]
    torch.testing.assert_close(scorer.score(texts, texts), scorer.logits(texts)[:, 0])
    assert scorer.score(texts, texts)[0] < 0


def test_a_classifier_that_reads_padding_is_refused(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "judge"
    classifier.model.save_pretrained(folder)
    classifier.tokenizer.save_pretrained(folder)
    forward = RobertaForSequenceClassification.forward

    def blind(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any) -> Any:
        return forward(self, input_ids=input_ids, attention_mask=torch.ones_like(attention_mask), **others)

    load_classifier(str(folder), "reward.classifier", TOXIC, CPU, GOOD)
    monkeypatch.setattr(RobertaForSequenceClassification, "forward", blind)
    with pytest.raises(InputError, match="gives a text other outputs when a longer one is read beside it, by up to"):
        load_classifier(str(folder), "reward.classifier", TOXIC, CPU, GOOD)
