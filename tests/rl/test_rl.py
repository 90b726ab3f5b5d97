"""The mathematics: numbers derived by hand, an independent float64 twin, and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twin
from detoxrl.config.schema import RlConfig
from detoxrl.rl.advantages import gae, token_rewards
from detoxrl.rl.algorithm import Targets, ppo_targets
from detoxrl.rl.kl import adapt_kl_coef, k1, k3
from detoxrl.rl.losses import explained_variance, policy_loss, value_loss
from detoxrl.rl.ops import masked_mean, masked_var, whiten
from random_batches import batch, close, normal

# By hand


def test_masked_mean_and_variance_leave_out_what_the_mask_says() -> None:
    values, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    assert masked_mean(values, mask).item() == 2.0
    assert masked_var(values, mask).item() == 1.0


def test_whiten_by_hand() -> None:
    whitened = whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(whitened, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_score_lands_on_the_last_token_and_kl_on_each() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.5, -1.0, 7.0], [-1.0, -1.0, -3.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), logprobs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 10.1, 0.0], [0.0, 0.0, 19.8]]))


def test_gae_by_hand() -> None:
    # deltas: 0 + 0.5 * 2 - 1 = 0, then 4 - 2 = 2; A_1 = 2, A_0 = 0 + 0.5 * 0.5 * 2 = 0.5
    advantages, returns = gae(
        torch.tensor([[0.0, 4.0, 0.0]]), torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[True, True, False]]), 0.5, 0.5
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.5, 2.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.5, 4.0, 0.0]]))


def test_policy_loss_clips_only_the_side_that_would_gain() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, clipped = policy_loss(ratios.log(), torch.zeros(1, 4), advantages, mask, (0.2, 0.2))
    assert loss.item() == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8)
    assert clipped.tolist() == [[True, False, False, True]]


def test_a_token_that_did_not_move_is_not_clipped_and_padding_never_is() -> None:
    mask = torch.tensor([[True, True, False]])
    new = torch.tensor([[0.0, 1.0, 500.0]], requires_grad=True)  # exp overflows in the padding
    loss, clipped = policy_loss(new, torch.zeros(1, 3), torch.ones(1, 3), mask, (0.2, 0.2))
    assert clipped.tolist() == [[False, True, False]]
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient.tolist() == [[-1.0, 0.0, 0.0]]


def test_value_loss_takes_the_worse_of_clipped_and_plain() -> None:
    # plain error 0 at value 1; clipped value is 0.2, error 0.8
    loss = value_loss(
        torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.ones(1, 1).bool(), clip=0.2
    )
    assert loss.item() == pytest.approx(0.5 * 0.8**2)


def test_ppo_targets_ignore_values_outside_the_mask() -> None:
    values = torch.tensor([[1.0, 2.0, 50.0], [1.0, 1.0, 1.0]])
    rewards = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rl = RlConfig(gamma=0.5, lam=0.5)

    targets = ppo_targets(rewards, values, mask, rl)
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert torch.equal(targets.advantages, whiten(advantages, mask))
    assert torch.equal(targets.returns, returns)
    assert targets.returns[0, 2] == 0


def test_both_targets_move_to_a_device() -> None:
    targets = Targets(advantages=torch.zeros(1, 2), returns=torch.ones(1, 2)).to(torch.device("meta"))
    assert targets.advantages.device.type == "meta"
    assert targets.returns.device.type == "meta"


def test_gae_of_one_token_and_of_rewards_in_the_padding() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    advantages, returns = gae(torch.tensor([[3.0, 8.0], [1.0, 2.0]]), torch.full((2, 2), 0.5), mask, 1.0, 1.0)
    torch.testing.assert_close(advantages, torch.tensor([[2.5, 0.0], [2.5, 1.5]]))
    torch.testing.assert_close(returns, torch.tensor([[3.0, 0.0], [3.0, 2.0]]))
    advantages, _ = gae(torch.tensor([[3.0]]), torch.tensor([[0.5]]), torch.tensor([[True]]), 1.0, 1.0)
    assert advantages.tolist() == [[2.5]]


def test_explained_variance_of_equal_returns_is_a_number() -> None:
    values, mask = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2).bool()
    assert explained_variance(torch.full((1, 2), 3.0), torch.full((1, 2), 3.0), mask).item() == 1.0
    # 0.25 of variance in the values, none in the returns: bounded by the floor of 1e-12
    assert explained_variance(values, torch.full((1, 2), 3.0), mask).item() == pytest.approx(-0.25e12)


def test_explained_variance_of_a_perfect_and_of_a_constant_critic() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3).bool()
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.full((1, 3), 5.0), returns, mask).item() == 0.0


def test_kl_coefficient_moves_with_the_error_and_no_faster_than_its_clip() -> None:
    assert adapt_kl_coef(0.1, kl=6.6, target=6.0, horizon=1000, batch_size=100) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coef(0.1, kl=600.0, target=6.0, horizon=1000, batch_size=100) == pytest.approx(0.1 * 1.02)
    assert adapt_kl_coef(0.1, kl=0.0, target=6.0, horizon=1000, batch_size=100) == pytest.approx(0.1 * 0.98)


# The twin


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_its_twin(seed: int, gamma: float, lam: float) -> None:
    generator, lengths, mask = batch(seed)
    rewards, values = normal(generator, mask) * mask, normal(generator, mask)
    ours = gae(rewards, values, mask, gamma, lam)
    for mine, theirs in zip(ours, twin.gae(rewards.tolist(), values.tolist(), lengths, gamma, lam), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("seed", range(5))
def test_rewards_whitening_and_losses_equal_their_twins(seed: int) -> None:
    generator, lengths, mask = batch(seed)
    new, old, advantages, values, returns = (normal(generator, mask) for _ in range(5))
    scores = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    close(
        token_rewards(scores, new, old, mask, 0.3),
        twin.token_rewards(scores.tolist(), new.tolist(), old.tolist(), lengths, 0.3),
    )
    close(whiten(advantages, mask), twin.whiten(advantages.tolist(), mask.tolist()))
    loss, _ = policy_loss(new, old, advantages, mask, (0.2, 0.2))
    close(loss, twin.policy_loss(new.tolist(), old.tolist(), advantages.tolist(), lengths, (0.2, 0.2)))
    close(
        value_loss(new, values, returns, mask, 0.2),
        twin.value_loss(new.tolist(), values.tolist(), returns.tolist(), lengths, 0.2),
    )
    estimators = [(k1, twin.k1), (k3, twin.k3)]
    for ours, theirs in estimators:
        pairs = zip(new.tolist(), old.tolist(), strict=True)
        close(ours(new, old), [[theirs(p, q) for p, q in zip(*rows, strict=True)] for rows in pairs])
    close(
        explained_variance(values, returns, mask), twin.explained_variance(values.tolist(), returns.tolist(), lengths)
    )
    means = [masked_mean(values, mask), masked_var(values, mask)]
    close(torch.stack(means), twin.mean_and_variance(values.tolist(), lengths))


@given(kl=st.floats(0, 100), target=st.floats(0.1, 50), size=st.integers(1, 512), horizon=st.integers(512, 10_000))
@settings(max_examples=50)
def test_the_kl_controller_equals_its_twin(kl: float, target: float, size: int, horizon: int) -> None:
    ours = adapt_kl_coef(0.1, kl, target, horizon, size)
    assert ours == pytest.approx(twin.adapt_kl_coef(0.1, kl, target, horizon, size), rel=1e-10)
    assert (ours > 0.1) == (kl > target) or ours == pytest.approx(0.1)


# Properties

seeds = st.integers(0, 2**31)


@given(seed=seeds, junk=st.floats(-1e6, 1e6))
@settings(max_examples=40)
def test_what_stands_in_the_padding_never_matters(seed: int, junk: float) -> None:
    generator, _, mask = batch(seed)
    tensors = [normal(generator, mask) for _ in range(4)]
    dirty = [torch.where(mask, tensor, junk) for tensor in tensors]
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)

    def everything(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> list[torch.Tensor]:
        rewards = token_rewards(scores, a, b, mask, 0.1)
        advantages, returns = gae(rewards, c, mask, 1.0, 0.95)
        loss, clipped = policy_loss(a, b, whiten(d, mask), mask, (0.2, 0.2))
        return [rewards, advantages, returns, loss, clipped.double(), value_loss(c, d, returns, mask, 0.2)]

    for clean, soiled in zip(everything(*tensors), everything(*dirty), strict=True):
        torch.testing.assert_close(clean, soiled, rtol=1e-12, atol=1e-12)


@given(seed=seeds)
@settings(max_examples=30)
def test_permuting_the_batch_permutes_the_result(seed: int) -> None:
    generator, _, mask = batch(seed)
    tensors = [normal(generator, mask) for _ in range(4)]
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    order = torch.randperm(len(mask), generator=generator)

    def everything(
        mask: torch.Tensor, scores: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        rewards = token_rewards(scores, a, b, mask, 0.1)
        advantages, returns = gae(rewards, c, mask, 1.0, 0.95)
        loss, clipped = policy_loss(a, b, whiten(advantages, mask), mask, (0.2, 0.2))
        by_row = [rewards, advantages, returns, whiten(advantages, mask), clipped.double(), k3(a, b)]
        return by_row, [loss, value_loss(c, d, returns, mask, 0.2), explained_variance(c, returns, mask)]

    rows, totals = everything(mask, scores, *tensors)
    shuffled, same = everything(mask[order], scores[order], *(tensor[order] for tensor in tensors))
    for one, other in zip(rows, shuffled, strict=True):
        torch.testing.assert_close(one[order], other, rtol=1e-10, atol=1e-10)
    for one, other in zip(totals, same, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@given(seed=seeds)
@settings(max_examples=30)
def test_lambda_one_is_return_minus_value_and_lambda_zero_the_td_error(seed: int) -> None:
    generator, _, mask = batch(seed)
    rewards, values = normal(generator, mask) * mask, normal(generator, mask) * mask
    monte_carlo, _ = gae(rewards, values, mask, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(monte_carlo, torch.where(mask, to_go - values, 0.0))
    one_step, _ = gae(rewards, values, mask, 0.9, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    torch.testing.assert_close(one_step, torch.where(mask, rewards + 0.9 * following - values, 0.0))


@given(seed=seeds)
@settings(max_examples=30)
def test_gradient_at_ratio_one_is_reinforce(seed: int) -> None:
    generator, _, mask = batch(seed)
    old, advantages = normal(generator, mask), normal(generator, mask)
    new = old.clone().requires_grad_()
    loss, _ = policy_loss(new, old, advantages, mask, (0.2, 0.2))
    (gradient,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages, 0.0))


@given(seed=seeds)
@settings(max_examples=30)
def test_a_masked_token_has_no_gradient_in_either_loss(seed: int) -> None:
    generator, _, mask = batch(seed)
    new, values = (normal(generator, mask).requires_grad_() for _ in range(2))
    others = [normal(generator, mask) for _ in range(4)]
    loss, _ = policy_loss(new, others[0], others[1], mask, (10.0, 10.0))
    loss = loss + value_loss(values, others[2], others[3], mask, 10.0)
    for gradient in torch.autograd.grad(loss, [new, values]):
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).any()


@given(p=st.floats(-20, 0), q=st.floats(-20, 0))
def test_k3_is_never_negative_and_zero_only_without_difference(p: float, q: float) -> None:
    value = k3(torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)).item()
    assert value >= 0
    assert (value == 0) == (p == q) or abs(p - q) < 1e-7


def test_k1_and_k3_estimate_the_same_kl() -> None:
    p, q = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.4, 0.6]).double()
    exact = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)
    assert (p * k1(p.log(), q.log())).sum().item() == pytest.approx(exact)
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx(exact)
