"""What holds for every policy: four architectures, each under a fresh LoRA, a loaded LoRA and full weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from conftest import ENCODER_DECODERS, KINDS, Make, disturb, small_config
from detoxrl.models import policy as policy_module
from detoxrl.models.plain import PlainNetwork
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, batches_by_length, sample_all
from detoxrl.models.types import Encoded
from detoxrl.models.weights import POLICY, LoraWeights
from detoxrl.rl.kl import k1
from detoxrl.training.rollout import collect_rollout
from learning import (
    LENGTH,
    PROMPTS,
    TEXTS,
    learn,
    learner_of,
    loop_config,
    rollout_of,
    run_update,
    share_of_e,
    targets_of,
    use_sgd,
)

EOS = 1


def every_weight(policy: Policy) -> dict[str, torch.Tensor]:
    """Return a copy of all weights by name: trained, frozen, and those of the reference."""
    weights = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    if not isinstance(policy.weights, LoraWeights):
        with policy.weights.using(None):
            start = dict(policy.weights.active.named_parameters())
        weights.update({f"start {name}": weight.detach().clone() for name, weight in start.items()})
    return weights


# KL is 0 at the first step, and ratios are 1 in the first minibatch of every step


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_zero_at_the_first_step_and_grows_once_the_policy_moves(policy: Policy, temperature: float) -> None:
    rollout = rollout_of(policy, temperature=temperature)
    tensors = (rollout.encoded.states, rollout.responses.logprobs, rollout.responses.values, rollout.ref_logprobs)
    assert not any(tensor.requires_grad for tensor in tensors)
    assert k1(rollout.responses.logprobs, rollout.ref_logprobs).abs().max().item() < 1e-5
    disturb(policy)
    moved = rollout_of(policy)
    assert k1(moved.responses.logprobs, moved.ref_logprobs).abs().max().item() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_in_the_first_minibatch_and_moves_after_it(policy: Policy, temperature: float) -> None:
    generation = replace(small_config().generation, temperature=temperature)
    config = replace(loop_config(update_kl_limit=None, lr=1e-2), generation=generation)
    statistics = run_update(policy, config, rollout_of(policy, temperature=temperature))
    assert statistics["ratio/first_error"] < 1e-5
    assert statistics["ratio/max"] > 1.001


def test_a_ratio_below_one_in_the_first_minibatch_is_reported(fresh: Policy) -> None:
    rollout = rollout_of(fresh)
    logprobs = rollout.responses.logprobs.clone()
    logprobs[1, 0] += 0.5
    shifted = replace(rollout, responses=replace(rollout.responses, logprobs=logprobs))
    statistics = run_update(fresh, loop_config(epochs=1, microbatch_size=2, minibatch_size=4, lr=1e-9), shifted)
    assert statistics["ratio/first_error"] == pytest.approx(1 - np.exp(-0.5), rel=1e-4)
    assert statistics["ratio/max"] == pytest.approx(1.0, rel=1e-4)


def test_in_the_loop_ratios_start_at_one_at_every_step_and_only_the_policy_moves(
    policy: Policy, tmp_path: Path
) -> None:
    before = every_weight(policy)
    trained = {id(weight) for weight in policy.parameters()}
    names = {name for name, weight in policy.model.named_parameters() if id(weight) in trained}
    records = learn(policy, tmp_path, loop_config())
    assert [record["ratio/first_error"] < 1e-5 for record in records] == [True] * 3
    assert abs(records[0]["kl/reference"]) < 1e-5 < abs(records[-1]["kl/reference"])
    after = every_weight(policy)
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert policy.value_head.weight.abs().sum() > 0


# Sampling and scoring agree for every token


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_values_while_sampling_are_the_teacher_forced_ones(policy: Policy, temperature: float) -> None:
    disturb(policy)
    encoded = policy.encode(TEXTS)
    responses = policy.sample(encoded, Draws(0, "test").uniforms(policy, PROMPTS, LENGTH), temperature)
    assert responses.response_mask.sum(1).unique().numel() > 1  # some responses end early, some do not
    forced, entropy, values = policy.logprobs(encoded, responses.ids, temperature)
    mask = responses.response_mask
    torch.testing.assert_close(responses.logprobs[mask], forced[mask], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(responses.values[mask], values[mask], rtol=1e-4, atol=1e-4)  # a sum of terms that cancel
    assert (entropy[mask] > 0).all()


def test_logprobs_are_those_of_the_model_called_directly(policy: Policy) -> None:
    ids = torch.tensor([[40, 50, 7]])
    disturb(policy)
    logprobs, entropy, values = policy.logprobs(policy.encode([TEXTS[1]]), ids, 0.7)
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    prompt = policy.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    if policy.model.config.is_encoder_decoder:
        start = torch.tensor([[policy.model.config.decoder_start_token_id]])
        out = policy.model(prompt, decoder_input_ids=torch.cat([start, ids], 1), output_hidden_states=True)
        logits, states = out.logits[:, :3], out.decoder_hidden_states[-1][:, :3]
    else:
        out = policy.model(torch.cat([prompt, ids], 1), output_hidden_states=True)
        logits, states = out.logits[:, -4:-1], out.hidden_states[-1][:, -4:-1]
    expected = (logits.double() / 0.7).log_softmax(-1)
    scaled = states / states.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(values, policy.value_head(scaled)[..., 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logprobs.double(), expected.gather(-1, ids[..., None])[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-6)


def test_every_sampled_token_counts_including_the_first_and_eos(fresh: Policy) -> None:
    encoded = fresh.encode(TEXTS)
    # The inverse CDF of 0.9 is far above EOS, which is token 1 of hundreds, so no response ends.
    uniforms = torch.full((4, LENGTH), 0.9)
    endless = fresh.sample(encoded, uniforms, 1.0)
    assert endless.response_mask.all()
    assert not endless.ended.any()

    # A uniform in the middle of the interval of EOS draws it.
    logprobs = torch.stack([fresh.logprobs(encoded, torch.full((4, 1), token), 1.0)[0] for token in (0, EOS)])
    below, probability = logprobs[:, 2, 0].exp()
    uniforms[2, 0] = below + probability / 2
    responses = fresh.sample(encoded, uniforms, 1.0)
    assert responses.ids[2].tolist() == [EOS] + [fresh.pad_token_id] * (LENGTH - 1)
    assert responses.response_mask[2].tolist() == [True] + [False] * (LENGTH - 1)
    assert responses.logprobs[2, 0].item() == pytest.approx(probability.log().item(), abs=1e-5)
    assert responses.logprobs[2, 1:].abs().sum() == 0
    assert responses.ended.tolist() == [False, False, True, False]

    # The other rows do not change when one leaves.
    others = torch.tensor([0, 1, 3])
    assert responses.ids[others].tolist() == endless.ids[others].tolist()


def test_the_last_row_continues_after_all_others_have_ended(fresh: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, uniforms = fresh.encode(TEXTS), torch.full((4, LENGTH), 0.9)
    expected = fresh.sample(encoded, uniforms, 1.0).ids[1].tolist()
    draw = policy_module.draw_tokens

    def draw_eos_at_one_half(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        tokens = draw(logprobs, uniforms)
        return torch.where(uniforms == 0.5, EOS, tokens)

    monkeypatch.setattr(policy_module, "draw_tokens", draw_eos_at_one_half)
    uniforms[[0, 2, 3], 2] = 0.5
    responses = fresh.sample(encoded, uniforms, 1.0)
    assert responses.ids[1].tolist() == expected
    assert responses.response_mask.sum(1).tolist() == [3, LENGTH, 3, 3]
    assert responses.ended.tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("t5", "loaded with encoder"), ("bart", "loaded with encoder"), ("gpt2", "loaded"), ("llama", "loaded")],
)
def test_the_reference_can_be_sampled_after_the_policy_moved(name: str, kind: str, make_policy: Make) -> None:
    policy = make_policy(name, kind, encoder=name in ENCODER_DECODERS)
    config = replace(small_config().generation, max_new_tokens=LENGTH)

    def sampled(adapter: str | None = POLICY, samples: int = 1) -> list[list[str]]:
        drawn = sample_all(policy, PROMPTS, config, Draws(0, "x", samples=range(samples)), adapter)
        return [[response.text for response in responses] for responses in drawn]

    before = sampled()
    disturb(policy)
    assert sampled() != before
    assert sampled(policy.reference) == before
    assert not any("</s>" in text or "<pad>" in text for (text,) in before)

    pairs = sampled(policy.reference, samples=2)
    assert [texts[:1] for texts in pairs] == before
    assert all(first != second for first, second in pairs)


def test_batches_hold_prompts_of_similar_length_and_are_sampled_without_gradients(loaded: Policy) -> None:
    disturb(loaded)
    config = replace(small_config().generation, max_new_tokens=LENGTH, batch_size=3)
    grad_enabled, sample = [], loaded.sample

    def recording(*args: object) -> object:
        grad_enabled.append(torch.is_grad_enabled())
        return sample(*args)  # type: ignore[arg-type]

    loaded.sample = recording  # type: ignore[method-assign, assignment]
    sample_all(loaded, PROMPTS, config, Draws(0, "x"))
    assert batches_by_length(PROMPTS, 3) == [[2, 0, 1], [3]]
    assert grad_enabled == [False, False]


# Padding never changes a result


def test_a_response_depends_neither_on_its_batch_nor_on_padding(policy: Policy) -> None:
    disturb(policy)
    together = rollout_of(policy)
    for mask in (together.encoded.mask, together.responses.response_mask):
        assert mask.sum(1).unique().numel() > 1  # so prompts and responses are padded
    for row, prompt in enumerate(together.prompts):
        generation = replace(small_config().generation, max_new_tokens=LENGTH)
        alone = collect_rollout(policy, [prompt], generation, Draws(0, "rollout"))
        mask, mask_alone = together.responses.response_mask[row], alone.responses.response_mask[0]
        assert alone.responses.ids[0][mask_alone].tolist() == together.responses.ids[row][mask].tolist()
        pairs = (
            (alone.responses.logprobs[0], together.responses.logprobs[row]),
            (alone.ref_logprobs[0], together.ref_logprobs[row]),
            (alone.responses.values[0], together.responses.values[row]),
        )
        for actual, expected in pairs:
            torch.testing.assert_close(actual[mask_alone], expected[mask], rtol=1e-4, atol=1e-4)


def test_contents_of_padding_and_of_tokens_after_a_response_change_nothing(policy: Policy) -> None:
    encoded = policy.encode(TEXTS)
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    logprobs, _, _ = policy.logprobs(encoded, ids, 1.0)

    padding = ~encoded.mask.bool()
    other_states = torch.where(padding if encoded.states.ndim == 2 else padding[..., None], 17, encoded.states)
    other_ids = torch.cat([ids[:, :4], ids[:, 4:] + 9], 1)
    other_logprobs, _, _ = policy.logprobs(replace(encoded, states=other_states), other_ids, 1.0)
    torch.testing.assert_close(logprobs[:, :4], other_logprobs[:, :4], rtol=1e-5, atol=1e-6)
    assert not torch.isclose(logprobs[:, 4:], other_logprobs[:, 4:]).any()


def test_a_causal_model_without_position_ids_would_be_wrong(make_policy: Make) -> None:
    policy = make_policy("gpt2", "fresh")
    encoded, ids = policy.encode(TEXTS), torch.full((4, 6), 40)
    mask = torch.cat([encoded.mask, torch.ones(4, 5, dtype=torch.long)], 1)
    logits = policy.model(torch.cat([encoded.states, ids[:, :5]], 1), attention_mask=mask).logits[:, -6:]
    naive = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    logprobs, _, _ = policy.logprobs(encoded, ids, 1.0)
    error = (naive - logprobs).abs().amax(1)
    assert error[3] < 1e-5  # the longest prompt has no padding
    assert (error[:3] > 0.5).all()


def test_rollout_batch_size_changes_nothing(policy: Policy) -> None:
    whole, split = rollout_of(policy), rollout_of(policy, batch_size=2)
    assert split.texts == whole.texts
    torch.testing.assert_close(split.responses.logprobs, whole.responses.logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split.ref_logprobs, whole.ref_logprobs, rtol=1e-4, atol=1e-5)


def test_a_rollout_is_as_long_as_its_longest_response(fresh: Policy) -> None:
    fresh.eos_token_ids = list(range(300))
    assert rollout_of(fresh).responses.ids.shape == rollout_of(fresh).ref_logprobs.shape == (4, 1)


def test_selecting_rows_drops_padding_that_none_of_them_needs_on_either_side() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    encoded = Encoded(states=torch.arange(9.0).view(3, 3, 1), mask=mask).select(torch.tensor([2, 1]))
    assert encoded.states.squeeze(-1).tolist() == [[6.0, 7.0], [3.0, 4.0]]
    assert encoded.mask.tolist() == [[1, 0], [1, 1]]
    left = Encoded(states=torch.arange(9).view(3, 3), mask=mask.flip(1)).select(torch.tensor([2, 1]))
    assert left.states.tolist() == [[7, 8], [4, 5]]
    assert left.mask.tolist() == [[0, 1], [1, 1]]


# Dropout is off


def test_dropout_is_off_in_rollout_reference_and_update(policy: Policy) -> None:
    encoded, ids = policy.encode(TEXTS), torch.full((4, 6), 40)
    for adapter in (POLICY, policy.reference, None):
        once, again = (policy.logprobs(encoded, ids, 1.0, adapter)[0] for _ in range(2))
        assert torch.equal(once, again)
        assert not any(module.training for module in policy.weights.active.modules())
    assert torch.equal(encoded.states, policy.encode(TEXTS).states)
    logprobs, _, _ = policy.logprobs(policy.encode(TEXTS), ids, 1.0)
    policy._network_class = PlainNetwork  # the fast T5 has no dropout that could be on
    policy.model.train()  # the models do have dropout, and it changes log-probs
    with_dropout, _, _ = policy.logprobs(policy.encode(TEXTS), ids, 1.0)
    assert (with_dropout - logprobs).abs().max() > 1e-3


def test_a_lora_that_is_added_later_has_no_dropout(
    loaded: Policy, starts: dict[object, Path], architecture: str
) -> None:
    loaded.weights.add("other", starts[architecture, "loaded"])
    assert not any(module.training for module in loaded.model.modules())


# Reference and base


def test_the_reference_of_a_loaded_lora_is_that_lora_and_not_the_bare_base(loaded: Policy) -> None:
    rollout = rollout_of(loaded)
    bare = loaded.encode([prompt.text for prompt in rollout.prompts], adapter=None)
    base, _, _ = loaded.logprobs(bare, rollout.responses.ids, 1.0, adapter=None)
    difference = (base - rollout.ref_logprobs)[rollout.responses.response_mask]
    assert difference.abs().max().item() > 1e-2


def test_one_base_is_in_memory_and_a_full_copy_holds_only_what_trains(
    make_policy: Make, bases: dict[str, Path]
) -> None:
    for name in ENCODER_DECODERS:
        full = make_policy(name, "full")
        weights = {weight.data_ptr() for weight in full.model.parameters()}
        trained = {weight.data_ptr() for weight in full.parameters()}
        with full.weights.using(None):
            start = {weight.data_ptr() for weight in full.weights.active.parameters()}
        assert weights & start == weights - trained

        bare, lora = AutoModelForSeq2SeqLM.from_pretrained(bases[name]), make_policy(name, "loaded")
        adapters = [weight for path, weight in lora.model.named_parameters() if "lora_" in path]
        expected = sum(weight.numel() for weight in [*bare.parameters(), *adapters])
        assert sum(weight.numel() for weight in lora.model.parameters()) == expected
        with lora.weights.using(lora.reference):
            assert {weight.data_ptr() for weight in lora.weights.active.parameters()} <= {
                weight.data_ptr() for weight in lora.model.parameters()
            }


# Gradients


def test_only_what_trains_has_gradients_and_they_are_not_all_zero(policy: Policy) -> None:
    config, rollout = loop_config(), rollout_of(policy)
    learner = learner_of(policy, Path("unused"), config, rollout)
    losses = learner._losses(torch.arange(4), torch.arange(4), targets_of(rollout))
    losses["policy"].backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with_gradient = {name for name, weight in policy.model.named_parameters() if weight.grad is not None}
    assert with_gradient == {name for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert not any(".encoder." in name for name in with_gradient)
    if isinstance(policy.weights, LoraWeights):
        assert all("lora_" in name and ".default." in name for name in with_gradient)

    parameters = dict(policy.model.named_parameters())
    gradients = {name: weight.grad.clone() for name, weight in parameters.items() if weight.grad is not None}
    assert sum(bool(gradient.any()) for gradient in gradients.values()) >= len(gradients) // 2
    assert policy.value_head.weight.grad is None
    losses["value"].backward()  # type: ignore[no-untyped-call]
    assert policy.value_head.weight.grad.abs().sum() > 0
    assert all(torch.equal(gradient, parameters[name].grad) for name, gradient in gradients.items())


def test_microbatch_size_does_not_change_the_update(make_policy: Make) -> None:
    for name, kind in KINDS:
        updates = []
        for microbatch in (1, 3, 4):
            policy = make_policy(name, kind)
            # Adam and clipping hide the scale of a gradient, so a wrong divisor shows in the norm before clipping only.
            config = loop_config(microbatch_size=microbatch, max_grad_norm=1e-3, epochs=1, lr=0.1, value_lr=0.1)
            weights = [*policy.parameters(), *policy.add_value_head().parameters()]
            rollout = rollout_of(policy)
            learner = learner_of(policy, Path("unused"), config, rollout)
            use_sgd(learner)
            statistics = learner.update(targets_of(rollout), step=0)
            updates.append((statistics["grad_norm"], torch.cat([weight.detach().flatten() for weight in weights])))

        expected_norm, expected_weights = updates[0]
        for norm, updated_weights in updates[1:]:
            assert norm == pytest.approx(expected_norm, rel=1e-4)
            torch.testing.assert_close(updated_weights, expected_weights, rtol=1e-4, atol=1e-6)


def test_a_trained_encoder_learns_and_the_reference_keeps_the_frozen_one(make_policy: Make) -> None:
    for name in ENCODER_DECODERS:
        for kind in ("fresh", "loaded with encoder", "full"):
            policy = make_policy(name, kind, encoder=True)
            before, states = every_weight(policy), policy.encode(TEXTS).states.detach()
            assert run_update(policy, loop_config(lr=1e-2), rollout_of(policy))["ratio/first_error"] < 1e-5

            after = every_weight(policy)
            changed = {name for name in before if not torch.equal(before[name], after[name])}
            assert any("encoder." in name for name in changed)
            assert not any(name.startswith("start ") or ".reference." in name for name in changed)
            torch.testing.assert_close(policy.encode(TEXTS, policy.reference).states, states, rtol=1e-4, atol=1e-5)
            assert (policy.encode(TEXTS).states - states).abs().max() > 1e-2

            rollout = rollout_of(policy)
            start = policy.encode([prompt.text for prompt in rollout.prompts], policy.reference)
            expected, _, _ = policy.logprobs(start, rollout.responses.ids, 1.0, policy.reference)
            mask = rollout.responses.response_mask
            torch.testing.assert_close(rollout.ref_logprobs[mask], expected[mask].detach(), rtol=1e-4, atol=1e-5)


# Save at step k, resume to step n


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_resumed_run_is_identical_to_an_uninterrupted_one(
    name: str, kind: str, make_policy: Make, tmp_path: Path
) -> None:
    calls = 0

    def failing(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # the first call fits the normaliser, each step makes one more
            raise ConnectionError
        return share_of_e(prompts, responses)

    whole, interrupted, resumed = (make_policy(name, kind) for _ in range(3))
    config = loop_config(steps=4, kl_target=1.0)
    expected_records = learn(whole, tmp_path / "whole", config)
    with pytest.raises(ConnectionError):
        learn(interrupted, tmp_path / "parts", config, failing)
    records = learn(resumed, tmp_path / "parts", config)

    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [without_times(record) for record in records] == [without_times(record) for record in expected_records]
    weights, expected_weights = every_weight(resumed), every_weight(whole)
    assert all(torch.equal(expected_weights[name], weights[name]) for name in expected_weights)
    assert torch.equal(whole.value_head.weight, resumed.value_head.weight)


def without_times(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if "second" not in name}
