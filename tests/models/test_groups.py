"""Responses to a prompt that is read once are those, and have the gradients, as if it were read for each of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ENCODER_DECODERS, Make, disturb, small_config
from detoxrl.config.schema import Config
from detoxrl.models.groups import closed_up, split_into_passes
from detoxrl.models.plain import PlainNetwork
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, sample_texts
from detoxrl.models.t5 import T5Network
from detoxrl.models.types import Encoded, Prompt, Responses, Rollout
from detoxrl.rl.algorithm import Targets
from detoxrl.training.rollout import collect_rollout
from learning import LENGTH, PROMPTS, TEXTS, learn, learner_of, loop_config, rollout_of, targets_of, use_sgd

GROUP = 3
REPEATED = [text for text in TEXTS for _ in range(GROUP)]


def sampled(policy: Policy, texts: Sequence[str]) -> Responses:
    """Twelve responses to the four texts, or to the texts repeated, from the same uniforms."""
    uniforms = Draws(0, "groups", samples=range(GROUP)).uniforms(policy, PROMPTS, LENGTH)
    return policy.sample(policy.with_shared_cross(policy.encode(texts)), uniforms, 0.9)


def gradients(policy: Policy, texts: Sequence[str], responses: Responses) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies and values of responses, and the gradients of a loss of all three."""
    weights = [*policy.parameters(), *policy.add_value_head().parameters()]
    encoded = policy.encode(texts)
    encoded = encoded if policy.train_encoder else policy.with_shared_cross(encoded)
    mask = responses.response_mask
    scored = policy.logprobs(encoded, responses.ids, 0.9, mask=mask, entropy_gradient=True)
    assert scored.values is not None

    generator = torch.Generator().manual_seed(2)
    by_token = torch.randn(3, *mask.shape, generator=generator)
    loss = (by_token[0] * scored.logprobs + by_token[1] * scored.entropy + by_token[2] * scored.values).sum()
    return (*scored, *torch.autograd.grad(loss, weights))


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Demand that no difference exceeds 1e-5 of the largest number of a tensor."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.detach().abs().max())))


def test_a_group_is_sampled_as_its_responses_are_one_by_one(policy: Policy) -> None:
    disturb(policy)
    together = sampled(policy, TEXTS)
    apart = sampled(policy, REPEATED)
    lengths = together.response_mask.sum(1).view(-1, GROUP)
    assert (lengths.amax(1) - lengths.amin(1)).max() > 3  # some leave a group early
    assert torch.equal(together.ids, apart.ids)
    assert torch.equal(together.ended, apart.ended)
    assert together.values is not None
    assert apart.values is not None
    assert_same([together.logprobs, together.values], [apart.logprobs, apart.values])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_group_has_the_gradients_of_its_responses_one_by_one(policy: Policy, checkpointing: bool) -> None:
    disturb(policy)
    responses = sampled(policy, TEXTS)
    expected = gradients(policy, REPEATED, responses)
    policy.checkpointing = checkpointing
    assert_same(gradients(policy, TEXTS, responses), expected)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_that_trains_gets_the_gradients_of_the_whole_group(name: str, make_policy: Make) -> None:
    policy = make_policy(name, "loaded with encoder", encoder=True)
    disturb(policy)
    responses = sampled(policy, TEXTS)
    assert_same(gradients(policy, TEXTS, responses), gradients(policy, REPEATED, responses))


def test_a_group_of_single_tokens_needs_the_prompt_alone(policy: Policy) -> None:
    responses = sampled(policy, TEXTS)
    first = replace(responses, ids=responses.ids[:, :1], response_mask=responses.response_mask[:, :1])
    assert_same(gradients(policy, TEXTS, first), gradients(policy, REPEATED, first))


def test_a_causal_model_reads_each_prompt_once_a_pass(make_policy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("gpt2", "fresh")
    passes: list[tuple[int, int]] = []
    forward = PlainNetwork.predicted

    def spy(network: PlainNetwork, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> Any:
        seen = cache.get_seq_length()
        passes.append((len(tokens), tokens.shape[1] if seen else encoded.states.shape[1]))
        return forward(network, encoded, tokens, cache)

    monkeypatch.setattr(PlainNetwork, "predicted", spy)
    width = policy.encode(TEXTS).mask.shape[1]
    responses = sampled(policy, TEXTS)
    assert passes[0] == (4, width)
    assert all(rows <= 12 and tokens == 1 for rows, tokens in passes[1:])

    passes.clear()
    gradients(policy, TEXTS, responses)
    assert passes == [(4, width), (12, responses.ids.shape[1] - 1)]


def test_an_encoder_reads_each_prompt_once_and_a_t5_projects_it_once(
    make_policy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("t5", "fresh", encoder=True)
    responses = sampled(policy, TEXTS)
    read: list[int] = []
    projected: list[int] = []
    read_prompts = T5Network.read
    keys_values = T5Network.cross_keys_values

    def spy_on_reading(network: T5Network, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        read.append(len(ids))
        return read_prompts(network, ids, mask)

    def spy_on_projecting(network: T5Network, i: int, encoded: Encoded) -> Any:
        projected.append(len(encoded.mask))
        return keys_values(network, i, encoded)

    monkeypatch.setattr(T5Network, "read", spy_on_reading)
    monkeypatch.setattr(T5Network, "cross_keys_values", spy_on_projecting)
    gradients(policy, TEXTS, responses)
    assert sum(read) == 4
    assert set(projected) == {4}


@pytest.mark.parametrize("fails", [False, True], ids=["without a backward pass", "after an error"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_nothing_of_a_pass_stays_in_memory(
    fails: bool, checkpointing: bool, make_policy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("gpt2", "fresh")
    responses = sampled(policy, TEXTS)
    policy.checkpointing = checkpointing
    read: list[weakref.ref[torch.Tensor]] = []
    forward = PlainNetwork.predicted

    def spy(network: PlainNetwork, encoded: Encoded, tokens: torch.Tensor, cache: Any) -> Any:
        if fails and read:
            raise RuntimeError("no memory")
        result = forward(network, encoded, tokens, cache)
        if not read:
            read.append(weakref.ref(cache.layers[0].keys))
        return result

    monkeypatch.setattr(PlainNetwork, "predicted", spy)
    with pytest.raises(RuntimeError) if fails else nullcontext():
        policy.logprobs(policy.encode(TEXTS), responses.ids, 0.9)
    gc.collect()
    assert read[0]() is None


# Rollouts and updates


def grouped(policy: Policy, **generation: object) -> Rollout:
    """A rollout of three responses to each of the four prompts."""
    config = replace(small_config().generation, **{"max_new_tokens": LENGTH, **generation})
    return collect_rollout(policy, PROMPTS, config, Draws(0, "rollout", samples=range(GROUP)))


def test_a_rollout_of_groups_holds_each_prompts_responses_in_consecutive_rows(loaded: Policy) -> None:
    disturb(loaded)
    rollout = grouped(loaded)
    assert [len(rollout.prompts), len(rollout.texts), rollout.group_size] == [4, 12, GROUP]
    assert [prompt.id for prompt in rollout.prompts_of_responses[:4]] == [rollout.prompts[0].id] * 3 + [
        rollout.prompts[1].id
    ]
    # The first sample of each prompt is the one that a rollout without groups has.
    single = rollout_of(loaded)
    assert rollout.texts[::GROUP] == single.texts
    length = single.ref_logprobs.shape[1]
    assert_same([rollout.ref_logprobs[::GROUP, :length]], [single.ref_logprobs])
    # No batch is larger than it may be, and its size changes nothing.
    sizes: list[int] = []
    sample = loaded.sample

    def spy(encoded: Encoded, uniforms: torch.Tensor, temperature: float) -> Responses:
        sizes.append(len(uniforms))
        return sample(encoded, uniforms, temperature)

    loaded.sample = spy  # type: ignore[method-assign, assignment]
    small = grouped(loaded, batch_size=7)
    assert sizes == [6, 6]
    assert small.texts == rollout.texts
    assert_same([small.ref_logprobs, small.responses.logprobs], [rollout.ref_logprobs, rollout.responses.logprobs])


def test_a_group_is_scored_alike_where_fewer_rows_fit(loaded: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(loaded)
    whole = grouped(loaded)
    for rows in (1, 2, 4):
        monkeypatch.setattr(loaded, "rows_at_once", lambda length, rows=rows: rows)
        assert_same([grouped(loaded).ref_logprobs], [whole.ref_logprobs])


@pytest.mark.parametrize("most", [1, 2, 5, 7, 100])
def test_samples_are_the_same_in_portions_of_any_size(most: int, make_policy: Make) -> None:
    policy = make_policy("gpt2", "fresh")
    sizes: list[int] = []
    sample = policy.sample

    def spy(encoded: Encoded, uniforms: torch.Tensor, *settings: Any) -> Responses:
        sizes.append(len(uniforms))
        return sample(encoded, uniforms, *settings)

    policy.sample = spy  # type: ignore[method-assign, assignment]
    generation = replace(small_config().generation, max_new_tokens=6)
    draws = Draws(0, "portions", samples=range(3))
    whole = sample_texts(policy, PROMPTS, generation, draws)
    assert [len(of_prompt) for of_prompt in whole] == [3] * 4
    assert len({text for of_prompt in whole for text in of_prompt}) > 6

    sizes.clear()
    assert sample_texts(policy, PROMPTS, replace(generation, batch_size=most), draws) == whole
    assert sum(sizes) == 12
    assert max(sizes) <= most
    assert len(sizes) == {1: 12, 2: 6, 5: 4, 7: 2, 100: 1}[most]


def group_config(**rl: object) -> Config:
    """A config whose minibatches are two groups of three."""
    settings = {"batch_size": 12, "minibatch_size": 6, "group_size": GROUP, "microbatch_size": None, "epochs": 1}
    return loop_config(**{**settings, "lr": 0.1, "value_lr": 0.1, "update_kl_limit": None, **rl})


def split(rollout: Rollout, policy: Policy) -> Rollout:
    """The same responses, each with a prompt of its own."""
    prompts = [replace(prompt, id=str(row)) for row, prompt in enumerate(rollout.prompts_of_responses)]
    encoded = policy.with_shared_cross(policy.encode([prompt.text for prompt in prompts]))
    return replace(rollout, prompts=prompts, encoded=encoded)


def updated(policy: Policy, config: Config, rollout: Rollout, targets: Targets, microbatch: int) -> torch.Tensor:
    """The weights after an update by plain gradient descent."""
    learner = learner_of(policy, Path("unused"), config, rollout, microbatch)
    use_sgd(learner)
    learner.update(targets, step=0)
    weights = [*policy.parameters(), *policy.add_value_head().parameters()]
    return torch.cat([weight.detach().flatten() for weight in weights])


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
@pytest.mark.parametrize("microbatch", [6, 4, 3, 2, 1])
def test_an_update_of_groups_is_that_of_their_responses_whatever_the_microbatch(
    name: str, microbatch: int, make_policy: Make
) -> None:
    whole = {"minibatch_size": 12, "max_grad_norm": 1e9}
    rollout = grouped(make_policy(name, "loaded"))
    targets = targets_of(rollout)

    policy = make_policy(name, "loaded")
    expected = updated(policy, group_config(**whole, group_size=1), split(rollout, policy), targets, 12)
    found = updated(make_policy(name, "loaded"), group_config(**whole), rollout, targets, microbatch)
    start = updated(make_policy(name, "loaded"), group_config(**whole, lr=1e-12, value_lr=1e-12), rollout, targets, 12)
    assert (expected - start).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("most", range(1, 14))
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6])
def test_microbatches_have_every_row_once_and_as_many_rows_to_each_prompt(most: int, group_size: int) -> None:
    prompts = torch.tensor([7, 2, 5, 3])
    rows: list[int] = []
    for part, of_part in split_into_passes(prompts, group_size, most):
        assert len(of_part) <= most
        assert len(of_part) % len(part) == 0
        each = len(of_part) // len(part)
        assert (of_part // group_size).tolist() == part.repeat_interleave(each).tolist()
        rows += of_part.tolist()
    assert sorted(rows) == sorted(
        prompt * group_size + sample for prompt in (7, 2, 5, 3) for sample in range(group_size)
    )


# No critic where none is used


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "reinforce"])
def test_without_a_critic_no_values_are_computed_stored_or_saved(
    algorithm: str, make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("t5", "fresh")
    policy.value_head = None

    def no_values(*_: object) -> torch.Tensor:
        raise AssertionError("values were computed")

    monkeypatch.setattr(Policy, "_values", no_values)
    config = loop_config(algorithm=algorithm, batch_size=8, minibatch_size=8, microbatch_size=None)
    records = learn(policy, tmp_path, config)
    assert policy.value_head is None
    assert rollout_without_values(policy)
    assert not any(name.startswith("value/") for record in records for name in record)
    names = {path.name for path in (tmp_path / "checkpoints/train").rglob("*")}
    assert names
    saved = b"".join(path.read_bytes() for path in (tmp_path / "checkpoints/train").rglob("*") if path.is_file())
    assert b"value_head" not in saved


def rollout_without_values(policy: Policy) -> bool:
    """Whether a rollout of the policy has no values."""
    generation = replace(small_config().generation, max_new_tokens=LENGTH)
    return collect_rollout(policy, [Prompt(id="a", text="Hello.")], generation, Draws(0, "x")).responses.values is None


def test_places_close_up_where_a_prompt_has_no_rows_left() -> None:
    # Of 4 prompts with 3 places each, the first and the third have none left.
    places, prompts = closed_up(torch.tensor([4, 9, 11]), group_size=3)
    assert places.tolist() == [1, 3, 5]
    assert prompts.tolist() == [1, 3]
