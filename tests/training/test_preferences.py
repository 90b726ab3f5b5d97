"""DPO learns from pairs of sampled responses, on every architecture, and resumes exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Make, disturb, small_config
from detoxrl.config.schema import Config
from detoxrl.errors import TrainingError
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, Response, sample_all
from detoxrl.rl.losses import dpo_loss
from detoxrl.runtime import checkpoint
from detoxrl.training import preferences
from detoxrl.training.preferences import PreferencePair, learn_preferences, pairs_per_step, preference_loss
from learning import PROMPTS


def dpo_config(steps: int = 3, lr: float = 1e-2, microbatch_size: int | None = None) -> Config:
    small = small_config()
    sft = replace(small.sft, baseline_lr=2 * lr, baseline_steps=steps, batch_size=8)
    return replace(small, sft=sft, rl=replace(small.rl, microbatch_size=microbatch_size, minibatch_size=8))


def pairs_of(policy: Policy, temperature: float = 1.0) -> list[PreferencePair]:
    """Two samples of each prompt; the one with more of the letter e is the better one."""
    generation = replace(small_config().generation, temperature=temperature)
    drawn = sample_all(policy, PROMPTS, generation, Draws(0, "x", samples=range(2)), policy.reference)
    pairs = []
    for prompt, responses in zip(PROMPTS, drawn, strict=True):
        worst, best = sorted(responses, key=lambda response: response.text.count("e"))
        pairs.append(PreferencePair(prompt.text, best, worst))
    return pairs


def log_ratio(policy: Policy, prompt: str, response: Response) -> float:
    """Return log(policy / initial policy) of one response that is read alone."""
    with torch.no_grad():
        scored = policy.logprobs(policy.encode([prompt]), torch.tensor([response.ids]), 1.0)
    return float(scored.logprobs.sum()) - response.logprob


def weights_of(policy: Policy) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in policy.parameters()])


def test_at_the_start_the_loss_is_log_2_of_a_pair(policy: Policy) -> None:
    loss = preference_loss(policy, pairs_of(policy), 1.0)
    assert loss.item() == pytest.approx(len(PROMPTS) * math.log(2), abs=1e-4)


def test_the_loss_is_that_of_each_response_alone_and_of_a_temperature(policy: Policy) -> None:
    pairs = pairs_of(policy, temperature=0.7)
    disturb(policy)

    def ratio(prompt: str, response: Response) -> torch.Tensor:
        scored = policy.logprobs(policy.encode([prompt]), torch.tensor([response.ids]), 0.7)
        return scored.logprobs.sum() - response.logprob

    with torch.no_grad():
        best = torch.stack([ratio(pair.prompt, pair.best) for pair in pairs])
        worst = torch.stack([ratio(pair.prompt, pair.worst) for pair in pairs])
        loss = preference_loss(policy, pairs, 0.7)
    torch.testing.assert_close(loss, dpo_loss(best, worst, 0.1), rtol=1e-4, atol=1e-5)
    assert abs(loss.item() - len(pairs) * math.log(2)) > 0.05


@pytest.mark.parametrize(
    ("name", "kind", "encoder"),
    [("t5", "fresh", False), ("t5", "loaded with encoder", True), ("t5", "full", True), ("gpt2", "fresh", False),
     ("gpt2", "full", False)],
)  # fmt: skip
def test_the_best_becomes_more_likely_than_the_worst(
    make_policy: Make, name: str, kind: str, encoder: bool, tmp_path: Path
) -> None:
    policy = make_policy(name, kind, encoder)
    pairs = pairs_of(policy)
    losses = [loss for _, loss in learn_preferences(policy, pairs, dpo_config(steps=12), tmp_path)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.6 * losses[0]

    for pair in pairs:
        best = log_ratio(policy, pair.prompt, pair.best)
        worst = log_ratio(policy, pair.prompt, pair.worst)
        assert best > 0 > worst


def test_the_tokens_that_were_drawn_are_learnt_and_not_the_text(make_policy: Make, tmp_path: Path) -> None:
    texts_alike = make_policy("t5", "fresh")
    pairs = pairs_of(texts_alike)
    retold = [
        PreferencePair(prompt, best._replace(text="other"), worst._replace(text="other"))
        for prompt, best, worst in pairs
    ]
    # These letters are one token as a rule, and would become another sequence on the way through a text.
    tokenizer = texts_alike.tokenizer
    again = [tokenizer(pair.best.text).input_ids for pair in pairs]
    assert again != [pair.best.ids for pair in pairs]

    policies = [make_policy("t5", "fresh") for _ in range(2)]
    for policy, learnt in zip(policies, (pairs, retold), strict=True):
        for _ in learn_preferences(policy, learnt, dpo_config(), tmp_path / str(id(policy))):
            pass
    assert torch.equal(weights_of(policies[0]), weights_of(policies[1]))


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_microbatch_changes_memory_alone(
    make_policy: Make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def measured(policy: Policy, pairs: Sequence[PreferencePair], temperature: float) -> torch.Tensor:
        sizes.append(len(pairs))
        return preference_loss(policy, pairs, temperature)

    monkeypatch.setattr(preferences, "preference_loss", measured)
    losses = []
    for microbatch_size, expected in ((None, [4]), (4, [2, 2]), (3, [1, 1, 1, 1]), (1, [1, 1, 1, 1])):
        policy = make_policy(name, "fresh")
        config = dpo_config(steps=2, microbatch_size=microbatch_size)
        folder = tmp_path / str(microbatch_size)
        losses.append([loss for _, loss in learn_preferences(policy, pairs_of(policy), config, folder)])
        assert sizes == expected * 2
        sizes.clear()
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_a_step_reads_half_as_many_pairs_as_the_other_baselines_read_targets() -> None:
    sft = dpo_config().sft
    assert [pairs_per_step(replace(sft, batch_size=size)) for size in (32, 5, 1)] == [16, 2, 1]


def test_the_learning_rate_falls_to_zero_and_the_gradient_is_clipped(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    norms: list[float] = []
    step = torch.optim.AdamW.step
    clip = torch.nn.utils.clip_grad_norm_

    def noting(optimizer: torch.optim.AdamW) -> object:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    def clipping(weights: object, norm: float) -> object:
        norms.append(norm)
        return clip(weights, norm)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    policy = make_policy("t5", "fresh")
    config = dpo_config(steps=4, lr=1e-3)
    config = replace(config, rl=replace(config.rl, max_grad_norm=0.25))
    assert [done for done, _ in learn_preferences(policy, pairs_of(policy), config, tmp_path)] == [1, 2, 3, 4]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert norms == [0.25] * 4


@pytest.mark.parametrize(("name", "kind"), [("t5", "fresh"), ("gpt2", "full")])
def test_what_was_stopped_ends_as_if_it_had_not_been(
    make_policy: Make, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)  # A checkpoint before each step.
    config = dpo_config(steps=5)
    whole = make_policy(name, kind)
    pairs = pairs_of(whole)
    losses = [loss for _, loss in learn_preferences(whole, pairs, config, tmp_path / "whole")]

    stopped = make_policy(name, kind)
    part = [loss for _, loss in itertools.islice(learn_preferences(stopped, pairs, config, tmp_path / "parts"), 3)]
    resumed = make_policy(name, kind)
    rest = list(learn_preferences(resumed, pairs, config, tmp_path / "parts"))
    assert [done for done, _ in rest] == [3, 4, 5]  # The third step was after the last checkpoint.
    assert [*part[:2], *(loss for _, loss in rest)] == losses
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_a_loss_that_is_not_finite_stops_it(make_policy: Make, tmp_path: Path) -> None:
    policy = make_policy("t5", "fresh")
    pairs = pairs_of(policy)
    broken = [pair._replace(best=pair.best._replace(logprob=math.nan)) for pair in pairs]
    before = weights_of(policy)
    with pytest.raises(
        TrainingError, match=r"sft stopped at step 0 of DPO: the loss is nan; a lower sft\.baseline_lr may"
    ):
        next(learn_preferences(policy, broken, dpo_config(), tmp_path))
    assert torch.equal(weights_of(policy), before)
