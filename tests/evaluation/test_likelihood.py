"""Perplexity and entropy of sampled tokens: against numbers by hand, a float64 model and a model that is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2LMHeadModel

from conftest import Make, disturb
from detoxrl.config.schema import GenerationConfig
from detoxrl.evaluation.compare import Measured
from detoxrl.evaluation.likelihood import likelihood_metrics, per_token, perplexity
from detoxrl.evaluation.statistics import Floats, compare, kept_metric
from detoxrl.models.loading import load_base
from detoxrl.models.lora import make_frozen_policy
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Distribution, Draws, Likelihood, Sample, sample_with_likelihoods
from detoxrl.models.types import Prompt
from detoxrl.models.weights import POLICY

PROMPTS = [
    Prompt(id="a", text="Summarize: Ann is late."),
    Prompt(id="b", text="Summarize the following conversation: Bob is early and Ann is late again."),
    Prompt(id="c", text="Hello."),
]
DRAWS = Draws(0, "evaluation")


def sampled(
    source: Distribution, initial: Distribution | None, prompts: Sequence[Prompt], samples: int, length: int
) -> list[list[Sample]]:
    """So many samples of up to `length` tokens of each prompt."""
    draws = replace(DRAWS, samples=range(samples))
    return sample_with_likelihoods(source, initial, prompts, draws, GenerationConfig(max_new_tokens=length))


TEMPERATURE = 0.7


# Numbers by hand


def test_the_mean_is_weighted_by_tokens_and_the_values_are_its_linear_terms() -> None:
    nats = np.array([[1.0, 3.0], [2.0, 6.0]])
    tokens = np.array([[1.0, 2.0], [1.0, 4.0]])
    # 12 nats over 8 tokens are 1.5; the mean length is 2: 1.5 + (1 - 1.5) / 2, and so on
    assert per_token(nats, tokens).tolist() == [[1.25, 1.5], [1.75, 1.5]]


def sample(tokens: int, logprob: float, initial: float) -> Sample:
    return Sample("x", Likelihood(tokens, logprob, initial))


def test_metrics_by_hand() -> None:
    samples = [[sample(2, -1.0, -3.0), sample(2, -2.0, -3.0)], [sample(2, -3.0, -6.0), sample(2, -2.0, -4.0)]]
    found = likelihood_metrics(samples, are_draws=True)
    assert {name: values.tolist() for name, values in found.items()} == {
        "nll": [[1.5, 1.5], [3.0, 2.0]],
        "entropy": [[0.5, 1.0], [1.5, 1.0]],
    }
    assert [*likelihood_metrics(samples, are_draws=False)] == ["nll"]  # what was picked says nothing of the entropy
    assert likelihood_metrics([*samples, [sample(1, -1, -1), Sample("filtered", None)]], are_draws=True) == {}


def test_perplexity_is_exp_of_the_nats_and_its_change_a_ratio() -> None:
    before = np.array([[1.0], [2.0], [3.0]])
    nll = compare(before, before + math.log(2), resamples=200, seed=0)
    found = perplexity(nll)
    assert (found["before"], found["after"]) == (pytest.approx(math.exp(2)), pytest.approx(2 * math.exp(2)))
    assert found["ratio"] == {name: pytest.approx(2) for name in ("mean", "low", "high")}
    spread = perplexity(compare(before, before * np.array([[1.0], [1.1], [1.3]]), resamples=200, seed=0))["ratio"]
    assert spread["low"] < spread["mean"] < spread["high"]
    assert perplexity(kept_metric(before)) == {"before": math.exp(2), "after": math.exp(2), "ratio": None}


positive = arrays(np.float64, (4, 3), elements=st.floats(0.01, 50))


@given(positive, positive, st.floats(0.1, 10))
def test_the_mean_is_the_ratio_whatever_the_lengths(nats: Floats, tokens: Floats, scale: float) -> None:
    found = per_token(nats, tokens)
    assert found.mean() == pytest.approx(nats.sum() / tokens.sum())
    np.testing.assert_allclose(per_token(scale * nats, tokens), scale * found, rtol=1e-9, atol=1e-9)
    even = np.full_like(tokens, 3.0)
    np.testing.assert_allclose(per_token(nats, even), nats / 3, rtol=1e-9)


def test_the_spread_of_the_values_is_that_of_the_ratio_when_prompts_are_drawn_again() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.geometric(0.1, size=(400, 2)).astype(float)
    rates = rng.gamma(4, 0.25, size=(400, 1)) / np.sqrt(tokens)  # long responses are likelier
    nats = rates * tokens
    error = per_token(nats, tokens).mean(1).std(ddof=1) / 20
    rows = rng.integers(400, size=(4000, 400))
    resampled = nats[rows].sum((1, 2)) / tokens[rows].sum((1, 2))
    assert error == pytest.approx(resampled.std(), rel=0.05)
    assert (nats / tokens).mean(1).std(ddof=1) / 20 > 1.15 * error  # another mean has another error


def test_further_metrics_stand_beside_those_of_each_policy() -> None:
    one = np.ones((2, 1))
    measured = Measured({"judge": {}}, {"before": {"length": one}, "word_filter": {"length": one}}, {})
    found = measured.with_metrics({"before": {"nll": 2 * one}, "word_filter": {}})
    assert [*found.metrics["before"]] == ["length", "nll"]
    assert [*found.metrics["word_filter"]] == ["length"]


# Tiny models


def float64_logprobs(name: str, base: Path, adapter: Path, text: str, ids: list[int]) -> list[float]:
    """Return the log-prob of each id by transformers and peft in float64, on one prompt without padding."""
    auto = AutoModelForCausalLM if name == "gpt2" else AutoModelForSeq2SeqLM
    model = PeftModel.from_pretrained(auto.from_pretrained(base), str(adapter)).double().eval()
    _, tokenizer = load_base(str(base))
    prompt = tokenizer(text, return_tensors="pt").input_ids
    response = torch.tensor([ids])
    with torch.no_grad():
        if name == "gpt2":
            logits = model(input_ids=torch.cat([prompt, response], 1)).logits[:, prompt.shape[1] - 1 : -1]
        else:
            start = torch.tensor([[model.config.decoder_start_token_id]])
            logits = model(input_ids=prompt, decoder_input_ids=torch.cat([start, response[:, :-1]], 1)).logits
    chosen = (logits / TEMPERATURE).log_softmax(-1)[0].gather(1, response[0, :, None])
    return [float(value) for value in chosen[:, 0]]


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2"])
def test_the_tokens_that_were_sampled_have_the_nll_of_a_float64_model(
    name: str, make_policy: Make, bases: dict[str, Path], starts: dict[tuple[str, str], Path]
) -> None:
    policy = make_policy(name, "loaded")
    disturb(policy)  # the trained policy is another one than the initial one
    source = Distribution(policy, POLICY, TEMPERATURE, encoder=POLICY)
    initial = Distribution(policy, policy.reference, TEMPERATURE, encoder=policy.reference)
    found = sampled(source, initial, PROMPTS, samples=2, length=9)

    lengths = set()
    for number in range(2):
        responses = source.draw(
            source.encode(PROMPTS), replace(DRAWS, samples=range(number, number + 1)).uniforms(policy, PROMPTS, 9)
        )
        for row, prompt in enumerate(PROMPTS):
            ids = responses.ids[row][responses.response_mask[row]].tolist()
            expected = math.fsum(float64_logprobs(name, bases[name], starts[name, "loaded"], prompt.text, ids))
            likelihood = found[row][number].likelihood
            assert likelihood is not None
            assert likelihood.tokens == len(ids)  # the end of the text is a token too
            assert likelihood.initial_logprob == pytest.approx(expected, rel=1e-4)
            assert likelihood.logprob == pytest.approx(float(responses.logprobs[row].sum()), rel=1e-5)
            assert abs(likelihood.logprob - expected) > 0.1
            lengths.add(len(ids))
    assert len(lengths) > 1


def test_an_encoder_that_was_trained_reads_for_the_policy_and_the_initial_one_for_itself(make_policy: Make) -> None:
    policy = make_policy("t5", "loaded with encoder", encoder=True)
    initial = Distribution(policy, policy.reference, 1.0, encoder=policy.reference)
    alone = sampled(initial, initial, PROMPTS, samples=1, length=6)
    disturb(policy)
    source = Distribution(policy, POLICY, 1.0, encoder=POLICY)
    found = sampled(source, initial, PROMPTS, samples=1, length=6)
    responses = source.draw(source.encode(PROMPTS), DRAWS.uniforms(policy, PROMPTS, 6))
    encoded = policy.encode([prompt.text for prompt in PROMPTS], policy.reference)
    expected, _, _ = policy.logprobs(encoded, responses.ids, 1.0, policy.reference, responses.response_mask)
    sums = [likelihood_of(samples[0]).initial_logprob for samples in found]
    assert sums == pytest.approx(expected.sum(1).tolist(), rel=1e-4)
    assert [samples[0].text for samples in alone] != [samples[0].text for samples in found]


def likelihood_of(drawn: Sample) -> Likelihood:
    assert drawn.likelihood is not None
    return drawn.likelihood


def test_the_initial_policy_needs_no_second_pass_and_one_with_other_tokens_has_no_likelihood(
    make_policy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("gpt2", "loaded")
    initial = Distribution(policy, policy.reference, TEMPERATURE, encoder=policy.reference)
    passes = []
    logprobs = policy.logprobs
    monkeypatch.setattr(policy, "logprobs", lambda *given, **named: (passes.append(1), logprobs(*given, **named))[1])
    found = sampled(initial, initial, PROMPTS, samples=2, length=6)
    assert passes == []
    assert all(one.logprob == one.initial_logprob for row in found for one in map(likelihood_of, row))
    warmer = initial._replace(temperature=1.3)
    assert sampled(warmer, initial, PROMPTS, samples=2, length=6) != found
    assert len(passes) == 1
    without = sampled(initial, None, PROMPTS, samples=2, length=6)
    assert [[one.text for one in row] for row in without] == [[one.text for one in row] for row in found]
    assert all(one.likelihood is None for row in without for one in row)


def known_policy(base: Path) -> tuple[Policy, torch.Tensor]:
    """Return a policy whose logits are the same after any text, and these logits (V,) in float64."""
    model, tokenizer = load_base(str(base))
    assert isinstance(model, GPT2LMHeadModel)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.randn(model.config.n_embd, generator=generator) * 2)
        logits = model.lm_head.weight.double() @ model.transformer.ln_f.bias.double()
    return make_frozen_policy(model, tokenizer), logits


def test_the_entropy_and_the_nll_of_a_model_that_is_known(bases: dict[str, Path]) -> None:
    policy, logits = known_policy(bases["gpt2"])
    policy.eos_token_ids += logits.topk(3).indices.tolist()  # so that lengths vary, and depend on what was drawn
    initial = Distribution(policy, None, 1.0, encoder=None)
    prompts = [Prompt(id=str(number), text="Hello.") for number in range(64)]
    source = initial._replace(temperature=0.8)
    samples = sampled(source, initial, prompts, samples=16, length=24)
    assert len({likelihood_of(one).tokens for row in samples for one in row}) > 5

    log_p, log_q = logits.log_softmax(-1), (logits / 0.8).log_softmax(-1)
    exact = {"entropy": -(log_q.exp() * log_q).sum(), "nll": -(log_q.exp() * log_p).sum()}
    for name, values in likelihood_metrics(samples, are_draws=True).items():
        error = values.mean(1).std(ddof=1) / 8
        assert error < 0.07
        assert abs(values.mean() - float(exact[name])) < 3 * error
    # The mean over responses of each one's nats per token is no estimate of it.
    tokens, nats, _ = np.moveaxis(np.array([[likelihood_of(one) for one in row] for row in samples]), 2, 0)
    assert abs((-nats / tokens).mean() - float(exact["entropy"])) > 3 * error
