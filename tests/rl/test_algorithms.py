"""What tells the algorithms apart: numbers derived by hand, float64 twins, properties, and the optimum they aim at."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import twin
from detoxrl.config.algorithms import AlgorithmName
from detoxrl.config.schema import RlConfig
from detoxrl.rl.advantages import (
    batch_relative,
    group_relative,
    leave_one_out,
    rewards_to_go,
    tail_scores,
    token_rewards,
    zero_variance_share,
)
from detoxrl.rl.algorithm import ALGORITHMS, Targets
from detoxrl.rl.kl import k1, k2
from detoxrl.rl.losses import kl_loss, policy_loss
from random_batches import batch, close, normal

NAMES: tuple[AlgorithmName, ...] = ("ppo", "rloo", "grpo", "reinforce")
KL_COEF = 0.3


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_scores(seed: int, number: int) -> torch.Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rl_config(name: AlgorithmName, group_size: int, std_scaling: bool | None = None, gamma: float = 1.0) -> RlConfig:
    return RlConfig(algorithm=name, group_size=group_size, std_scaling=std_scaling, gamma=gamma)


def targets_of(name: AlgorithmName, rewards: torch.Tensor, mask: torch.Tensor, rl: RlConfig) -> Targets:
    """The targets of an algorithm; a critic predicts 0.5 everywhere."""
    values = torch.full_like(rewards, 0.5) if rl.traits.has_critic else None
    return ALGORITHMS[name].targets(rewards, values, mask, rl)


# By hand


def test_leave_one_out_by_hand() -> None:
    # 1 against (2 + 6) / 2, 2 against (1 + 6) / 2, 6 against (1 + 2) / 2; then a group of its own
    advantages = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3)
    assert advantages.tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]


def test_group_relative_by_hand() -> None:
    # the first group has mean 2 and standard deviation sqrt((1 + 1) / 1); the second has none
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    assert group_relative(rewards, 2, std_scaling=False).tolist() == [-1.0, 1.0, 0.0, 0.0]
    scaled = 1 / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(group_relative(rewards, 2, std_scaling=True), torch.tensor([-scaled, scaled, 0.0, 0.0]))


def test_rewards_to_go_by_hand() -> None:
    # 4, then 2 + 4 / 2, then 1 + 4 / 2; the 8 stands in the padding
    mask = torch.tensor([[True, True, True, False]])
    to_go = rewards_to_go(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), mask, gamma=0.5)
    assert to_go.tolist() == [[3.0, 4.0, 4.0, 0.0]]


def test_batch_relative_by_hand() -> None:
    # tokens 1, 5 and 3: mean 3, variance 8 / 3
    mask = torch.tensor([[True, True], [True, False]])
    values = torch.tensor([[1.0, 5.0], [3.0, 99.0]])
    assert batch_relative(values, mask, std_scaling=False).tolist() == [[-2.0, 2.0], [0.0, 0.0]]
    scaled = 2 / math.sqrt(8 / 3)
    expected = torch.tensor([[-scaled, scaled], [0.0, 0.0]])
    torch.testing.assert_close(batch_relative(values, mask, std_scaling=True), expected)


def test_tail_scores_by_hand() -> None:
    # The lowest half is 1 and 2, whose mean is 1.5. 2 is the quantile; 1 is 1 below it, which counts 1 / 0.5 as much.
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0])
    tail = tail_scores(scores, 0.5)
    assert tail.tolist() == [2.0, 0.0, 2.0, 2.0]
    assert tail.mean().item() == 1.5
    assert tail_scores(scores, 0.4).tolist() == tail.tolist()  # 1.6 scores are 2
    assert tail_scores(scores, 0.01).tolist() == [1.0, 1.0, 1.0, 1.0]  # never less than one
    # Two scores are the quantile, and the lowest is 1 below it: 4 scores for 3 that count.
    assert tail_scores(double(2.0, 2.0, 1.0, 5.0), 0.75).tolist() == pytest.approx([2.0, 2.0, 2.0 - 4 / 3, 2.0])


def test_a_range_that_is_wider_upwards_lets_a_likelier_token_gain_more() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, clipped = policy_loss(ratios.log(), torch.zeros(1, 4), advantages, mask, (0.2, 0.4))
    assert loss.item() == pytest.approx(-1.4 + 1.5 - 0.5 + 0.8)
    assert clipped.tolist() == [[True, False, False, True]]

    loss, clipped = policy_loss(ratios.log(), torch.zeros(1, 4), advantages, mask, (0.6, 0.6))
    assert loss.item() == pytest.approx(-1.5 + 1.5 - 0.5 + 0.5)
    assert not clipped.any()


def test_kl_losses_by_hand() -> None:
    # q / p is 2 and 1 / 2; the third token is padding
    new = torch.tensor([[math.log(0.25), math.log(0.5), 5.0]])
    ref = torch.tensor([[math.log(0.5), math.log(0.25), -5.0]])
    mask = torch.tensor([[True, True, False]])
    assert k2(new, ref)[0, :2].tolist() == pytest.approx([math.log(2) ** 2 / 2] * 2)
    assert kl_loss(new, ref, mask, "k2").item() == pytest.approx(math.log(2) ** 2)
    assert kl_loss(new, ref, mask, "k3").item() == pytest.approx((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)))


def test_share_of_groups_without_variance_by_hand() -> None:
    assert zero_variance_share(torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0, 3.0]), 2).item() == pytest.approx(2 / 3)
    assert zero_variance_share(torch.tensor([1.0, 2.0, 3.0, 3.0, 3.0, 3.0]), 3).item() == 0.5
    assert zero_variance_share(torch.tensor([0.1, 0.1 + 1e-6]), 2).item() == 1.0  # equal but for rounding


REWARDS = torch.tensor([[1.0, 2.0], [5.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
MASK = torch.tensor([[True, True], [True, False], [True, True], [True, True]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Rewards of the responses are 3, 5 and 1, 5.
        ("rloo", [[-2.0, -2.0], [2.0, 0.0], [-4.0, -4.0], [4.0, 4.0]]),
        ("grpo", [[-1.0, -1.0], [1.0, 0.0], [-2.0, -2.0], [2.0, 2.0]]),
        # Rewards from each token on: 3, 2, 5, 1, 1, 5, 3, with mean 20 / 7.
        ("reinforce", [[1 / 7, -6 / 7], [15 / 7, 0.0], [-13 / 7, -13 / 7], [15 / 7, 1 / 7]]),
        # The same less the critic's 0.5, with lambda = 1.
        ("ppo", [[2.5, 1.5], [4.5, 0.0], [0.5, 0.5], [4.5, 2.5]]),
    ],
)
def test_targets_without_std_scaling_by_hand(name: AlgorithmName, expected: list[list[float]]) -> None:
    rl = RlConfig(algorithm=name, group_size=2, std_scaling=False, lam=1.0)
    targets = targets_of(name, REWARDS, MASK, rl)
    torch.testing.assert_close(targets.advantages, torch.tensor(expected))
    assert targets.kl_coef == 0
    assert (targets.returns is None) == (name != "ppo")


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("grpo", [math.sqrt(2), math.sqrt(8)]),  # deviations of 3, 5 and of 1, 5
        ("rloo", [math.sqrt(10), math.sqrt(10)]),  # of -2, 2, -4, 4
    ],
)
def test_std_scaling_divides_by_the_deviation_of_a_group_or_of_all_responses(
    name: AlgorithmName, scale: list[float]
) -> None:
    plain = targets_of(name, REWARDS, MASK, rl_config(name, 2, std_scaling=False)).advantages
    scaled = targets_of(name, REWARDS, MASK, rl_config(name, 2, std_scaling=True)).advantages
    by_row = torch.tensor(scale).repeat_interleave(2)[:, None]
    torch.testing.assert_close(scaled, plain / by_row, rtol=1e-4, atol=0.0)


def test_the_group_of_an_algorithm_is_the_one_it_has_by_default() -> None:
    rewards = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    mask = torch.ones(4, 1, dtype=torch.bool)
    assert targets_of("rloo", rewards, mask, RlConfig(algorithm="rloo")).advantages[3].item() == 4.0
    scaled = targets_of("grpo", rewards, mask, RlConfig(algorithm="grpo")).advantages[3].item()
    assert scaled == pytest.approx(3 / math.sqrt((4 + 1 + 0 + 9) / 3), rel=1e-3)


# The twins

GROUPED = [(8, 2), (8, 4), (9, 3), (6, 6)]  # responses of a batch, and of a group


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "group_size"), GROUPED)
def test_advantages_equal_their_twins(rows: int, group_size: int, seed: int) -> None:
    generator, lengths, mask = batch(seed, rows)
    scores = random_scores(seed, rows)
    values = normal(generator, mask)

    close(leave_one_out(scores, group_size), twin.leave_one_out(scores.tolist(), group_size))
    for std_scaling in (False, True):
        ours = group_relative(scores, group_size, std_scaling)
        close(ours, twin.group_relative(scores.tolist(), group_size, std_scaling))
        close(batch_relative(values, mask, std_scaling), twin.batch_relative(values.tolist(), lengths, std_scaling))
    for gamma in (1.0, 0.9, 0.0):
        close(rewards_to_go(values, mask, gamma), twin.rewards_to_go(values.tolist(), lengths, gamma))

    coarse = scores.round()
    share = zero_variance_share(coarse, group_size).double()
    torch.testing.assert_close(share.item(), twin.zero_variance_share(coarse.tolist(), group_size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.33, 0.5, 0.9, 1.0])
def test_tail_scores_equal_their_twin_and_their_mean_is_the_cvar_by_its_definition(share: float, seed: int) -> None:
    scores = random_scores(seed, 16)
    tail = tail_scores(scores, share)
    close(tail, twin.tail_scores(scores.tolist(), share))
    lowest = twin.lowest_of(scores.tolist(), share)
    assert tail.mean().item() == pytest.approx(math.fsum(lowest) / len(lowest), abs=1e-10)
    assert tail.mean().item() == pytest.approx(twin.cvar(scores.tolist(), share), abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28), (0.5, 0.1)])
def test_losses_equal_their_twins(clip: tuple[float, float], seed: int) -> None:
    generator, lengths, mask = batch(seed)
    new, old, advantages = (normal(generator, mask) for _ in range(3))
    loss, clipped = policy_loss(new, old, advantages, mask, clip)
    close(loss, twin.policy_loss(new.tolist(), old.tolist(), advantages.tolist(), lengths, clip))
    assert clipped[mask].any()

    for estimator in ("k2", "k3"):
        close(kl_loss(new, old, mask, estimator), twin.kl_loss(new.tolist(), old.tolist(), lengths, estimator))
    pairs = zip(new.tolist(), old.tolist(), strict=True)
    close(k2(new, old), [[twin.k2(p, q) for p, q in zip(*rows, strict=True)] for rows in pairs])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF], ids=["kl_in_the_loss", "kl_in_the_reward"])
@pytest.mark.parametrize("std_scaling", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("name", NAMES)
def test_targets_equal_their_twin_from_the_scores_on(
    name: AlgorithmName, std_scaling: bool, kl_coef: float, seed: int
) -> None:
    gamma, group_size = 0.9, 4
    generator, lengths, mask = batch(seed, rows=8)
    logprobs, ref, values = (normal(generator, mask) for _ in range(3))
    scores = random_scores(seed, len(mask))
    rl = RlConfig(algorithm=name, group_size=group_size, std_scaling=std_scaling, gamma=gamma, lam=0.8)

    rewards = token_rewards(scores, logprobs, ref, mask, kl_coef)
    ours = ALGORITHMS[name].targets(rewards, values if name == "ppo" else None, mask, rl)

    width = mask.shape[1]
    given_to_twin = (scores.tolist(), logprobs.tolist(), ref.tolist(), lengths, kl_coef)
    if name == "rloo":
        responses = twin.sequence_rewards(*given_to_twin)
        close(ours.advantages, twin.rloo(responses, lengths, width, group_size, std_scaling))
    if name == "grpo":
        responses = twin.sequence_rewards(*given_to_twin)
        close(ours.advantages, twin.grpo(responses, lengths, width, group_size, std_scaling))
    if name == "reinforce":
        to_go = twin.rewards_less_kl_to_go(*given_to_twin, gamma)
        close(ours.advantages, twin.batch_relative(to_go, lengths, std_scaling))
    if name == "ppo":
        tokens = twin.token_rewards(*given_to_twin)
        advantages, returns = twin.ppo(tokens, values.tolist(), lengths, gamma, 0.8, std_scaling)
        close(ours.advantages, advantages)
        assert ours.returns is not None
        close(ours.returns, returns)
    else:
        assert ours.returns is None


# Properties

seeds = st.integers(0, 2**31)
group_sizes = st.sampled_from([2, 3, 4, 6])
shares = st.floats(0.05, 1.0)
few = hypothesis_settings(max_examples=40)
ADVANTAGES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "rloo": leave_one_out,
    "grpo": lambda scores, group_size: group_relative(scores, group_size, std_scaling=True),
    "grpo without std": lambda scores, group_size: group_relative(scores, group_size, std_scaling=False),
}
by_group = pytest.mark.parametrize("advantages_of", ADVANTAGES.values(), ids=ADVANTAGES.keys())
Advantages = Callable[[torch.Tensor, int], torch.Tensor]


def same(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@by_group
@given(seed=seeds, group_size=group_sizes)
@few
def test_advantages_of_a_group_sum_to_zero(advantages_of: Advantages, seed: int, group_size: int) -> None:
    advantages = advantages_of(random_scores(seed, 12), group_size)
    same(advantages.view(-1, group_size).sum(1), torch.zeros(12 // group_size, dtype=torch.float64))
    assert (advantages != 0).any()


@by_group
@given(seed=seeds, group_size=group_sizes, shift=st.floats(-100, 100))
@few
def test_what_all_scores_of_a_group_have_in_common_changes_no_advantage(
    advantages_of: Advantages, seed: int, group_size: int, shift: float
) -> None:
    scores = random_scores(seed, 12)
    shifted = scores.clone()
    shifted[:group_size] += shift
    same(advantages_of(shifted, group_size), advantages_of(scores, group_size))


@given(seed=seeds, group_size=group_sizes)
@few
def test_rloo_is_grpo_without_std_times_k_over_k_minus_one(seed: int, group_size: int) -> None:
    scores = random_scores(seed, 12)
    factor = group_size / (group_size - 1)
    same(leave_one_out(scores, group_size), factor * group_relative(scores, group_size, std_scaling=False))


@given(seed=seeds, group_size=group_sizes, scale=st.floats(0.5, 50))
@few
def test_a_scale_of_all_scores_is_one_of_rloo_and_none_of_grpo_with_std(
    seed: int, group_size: int, scale: float
) -> None:
    scores = random_scores(seed, 12)
    same(leave_one_out(scale * scores, group_size), scale * leave_one_out(scores, group_size))
    # But for the epsilon that is added to the deviation.
    deviations = scores.view(-1, group_size).std(1).repeat_interleave(group_size)
    scaled = group_relative(scale * scores, group_size, std_scaling=True)
    plain = group_relative(scores, group_size, std_scaling=True)
    same(scaled * (1 + 1e-4 / (scale * deviations)), plain * (1 + 1e-4 / deviations))


@by_group
@given(seed=seeds, group_size=group_sizes)
@few
def test_permuting_groups_or_the_members_of_groups_permutes_the_advantages(
    advantages_of: Advantages, seed: int, group_size: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = random_scores(seed, 12)
    rows = torch.arange(12).view(-1, group_size)
    groups = rows[torch.randperm(len(rows), generator=generator)].flatten()
    members = rows[:, torch.randperm(group_size, generator=generator)].flatten()
    for order in (groups, members):
        same(advantages_of(scores[order], group_size), advantages_of(scores, group_size)[order])


@by_group
def test_a_group_of_equal_scores_teaches_nothing(advantages_of: Advantages) -> None:
    advantages = advantages_of(double(2.0, 2.0, 2.0, 1.0, 2.0, 3.0), 3)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages[3:].isfinite().all()
    assert advantages[3] < 0 < advantages[5]


@given(seed=seeds, share=shares)
@few
def test_the_tail_of_all_scores_is_the_scores_and_any_tail_keeps_their_order(seed: int, share: float) -> None:
    scores = random_scores(seed, 12)
    same(tail_scores(scores, 1.0), scores)

    order = scores.argsort()
    tail = tail_scores(scores, share)
    assert (tail[order].diff() >= 0).all()
    same(tail_scores(scores + 3, share), tail + 3)
    same(tail_scores(scores[order], share), tail[order])

    quantile = max(twin.lowest_of(scores.tolist(), share))
    above = scores >= quantile
    assert above.any()
    assert (tail[above] == quantile).all()


@given(seed=seeds, share=shares)
@few
def test_a_score_above_the_quantile_has_the_weight_of_a_constant_in_the_gradient(seed: int, share: float) -> None:
    scores = random_scores(seed, 12)
    quantile = max(twin.lowest_of(scores.tolist(), share))
    raised = torch.where(scores > quantile, scores + 7, scores)
    same(tail_scores(raised, share), tail_scores(scores, share))


@given(seed=seeds, clip=st.floats(0.05, 0.9))
@few
def test_an_asymmetric_range_acts_on_one_side_alone(seed: int, clip: float) -> None:
    generator, _, mask = batch(seed)
    new, old, advantages = (normal(generator, mask) for _ in range(3))
    ratio_rises = mask & (new > old)
    ratio_falls = mask & (new < old)
    _, symmetric = policy_loss(new, old, advantages, mask, (clip, clip))
    _, wide_above = policy_loss(new, old, advantages, mask, (clip, 1e9))
    _, wide_below = policy_loss(new, old, advantages, mask, (1.0, clip))
    assert torch.equal(wide_above, symmetric & ratio_falls)
    assert torch.equal(wide_below, symmetric & ratio_rises)


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, low=st.floats(0.1, 0.5), high=st.floats(0.1, 0.5))
@few
def test_the_gradient_at_ratio_one_is_reinforces(name: AlgorithmName, seed: int, low: float, high: float) -> None:
    generator, _, mask = batch(seed, rows=8)
    rewards, old = normal(generator, mask) * mask, normal(generator, mask)
    advantages = targets_of(name, rewards, mask, rl_config(name, group_size=4)).advantages
    new = old.clone().requires_grad_()
    loss, clipped = ALGORITHMS[name].policy_loss(new, old, advantages, mask, (low, high))
    (gradient,) = torch.autograd.grad(loss, new)
    same(gradient, -advantages)
    assert (gradient[~mask] == 0).all()
    assert not clipped.any()


@pytest.mark.parametrize("std_scaling", [False, True])
@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, junk=st.floats(-1e6, 1e6))
@few
def test_what_stands_in_the_padding_never_matters(
    name: AlgorithmName, std_scaling: bool, seed: int, junk: float
) -> None:
    generator, _, mask = batch(seed, rows=8)
    tensors = [normal(generator, mask) for _ in range(3)]
    scores = random_scores(seed, len(mask))
    rl = rl_config(name, group_size=4, std_scaling=std_scaling, gamma=0.9)

    def everything(new: torch.Tensor, logprobs: torch.Tensor, ref: torch.Tensor) -> list[torch.Tensor]:
        new = new.clone().requires_grad_()
        rewards = token_rewards(scores, logprobs, ref, mask, KL_COEF)
        advantages = targets_of(name, rewards, mask, rl).advantages
        loss, _ = ALGORITHMS[name].policy_loss(new, logprobs, advantages, mask, (0.2, 0.3))
        losses = [loss, kl_loss(new, ref, mask, "k2"), kl_loss(new, ref, mask, "k3")]
        gradients = [torch.autograd.grad(each, new)[0] for each in losses]
        return [advantages, *(each.detach() for each in losses), *gradients]

    clean = everything(*tensors)
    soiled = everything(*(torch.where(mask, tensor, junk) for tensor in tensors))
    for one, other in zip(clean, soiled, strict=True):
        same(one, other, tolerance=1e-12)
    assert (clean[0][~mask] == 0).all()
    for gradient in clean[4:]:
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("padding", [-1e6, 1e6, math.inf, -math.inf])
def test_padding_of_a_kl_loss_never_overflows(padding: float) -> None:
    mask = torch.tensor([[True, False]])
    new = torch.tensor([[-1.0, padding]], requires_grad=True)
    loss = kl_loss(new, torch.tensor([[-2.0, 0.0]]), mask, "k3") + kl_loss(new, torch.zeros(1, 2), mask, "k2")
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.isfinite()
    assert gradient[0, 0] != 0
    assert gradient[0, 1] == 0


def test_targets_move_to_a_device_with_what_they_have() -> None:
    moved = Targets(advantages=torch.zeros(1, 2), kl_coef=0.3).to(torch.device("meta"))
    assert moved.advantages.device.type == "meta"
    assert moved.returns is None
    assert moved.kl_coef == 0.3


# What the losses aim at: a policy over five words, whose expectations are sums over all words, or all groups of them

WORDS = 5
SCORES = double(0.9, 0.3, -0.2, -0.7, 0.1)


class Categorical:
    """A policy over `WORDS` words with random or given log-probs, and a reference."""

    def __init__(self, seed: int, logits: torch.Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(2, WORDS, generator=generator, dtype=torch.float64)
        self.ref = drawn[1].log_softmax(0)
        self.logits = (drawn[0] if logits is None else logits).detach().clone().requires_grad_()

    @property
    def logprobs(self) -> torch.Tensor:
        return self.logits.log_softmax(0)

    def kl(self) -> torch.Tensor:
        return (self.logprobs.exp() * (self.logprobs - self.ref)).sum()

    def reverse_kl(self) -> torch.Tensor:
        return (self.ref.exp() * (self.ref - self.logprobs)).sum()

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(value, self.logits, retain_graph=True)
        return gradient

    def mean_over_words(self, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The mean of a loss of one sampled word's (1, 1) log-prob and reference log-prob."""
        logprobs = self.logprobs
        chances = logprobs.detach().exp()
        losses = [loss_of(logprobs[word].view(1, 1), self.ref[word].view(1, 1)) for word in range(WORDS)]
        return (chances * torch.stack([loss.sum() for loss in losses])).sum()

    def mean_over_groups(
        self, scores: torch.Tensor, group_size: int, advantages_of: Advantages, kl_coef: float
    ) -> torch.Tensor:
        """The mean of a group's policy loss per response, whose rewards are scores less kl_coef * k1."""
        logprobs = self.logprobs
        total = torch.zeros((), dtype=torch.float64)
        for words in product(range(WORDS), repeat=group_size):
            group = torch.tensor(words)
            new = logprobs[group][:, None]
            old = new.detach()
            mask = torch.ones_like(new, dtype=torch.bool)
            rewards = token_rewards(scores[group], old, self.ref[group][:, None], mask, kl_coef)
            advantages = advantages_of(rewards[:, 0], group_size)[:, None]
            loss, _ = policy_loss(new, old, advantages, mask, (0.2, 0.2))
            total = total + old.sum().exp() * loss / group_size
        return total


@pytest.mark.parametrize("seed", range(3))
def test_as_a_loss_k1_has_no_gradient_k2_that_of_the_kl_and_k3_that_of_the_reverse_kl(seed: int) -> None:
    policy = Categorical(seed)
    mask = torch.ones(1, 1, dtype=torch.bool)
    same(policy.gradient(policy.mean_over_words(k1)), torch.zeros(WORDS, dtype=torch.float64))

    by_k2 = policy.mean_over_words(lambda new, ref: kl_loss(new, ref, mask, "k2"))
    same(policy.gradient(by_k2), policy.gradient(policy.kl()))

    by_k3 = policy.mean_over_words(lambda new, ref: kl_loss(new, ref, mask, "k3"))
    same(policy.gradient(by_k3), policy.gradient(policy.reverse_kl()))
    assert not torch.allclose(policy.gradient(by_k3), policy.gradient(policy.kl()), atol=1e-2)


@pytest.mark.parametrize("seed", range(3))
def test_in_the_reward_k1_has_the_gradient_of_the_kl(seed: int) -> None:
    policy = Categorical(seed)
    mask = torch.ones(1, 1, dtype=torch.bool)

    def loss_of(new: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
        rewards = token_rewards(torch.zeros(1, dtype=torch.float64), new.detach(), ref, mask, 1.0)
        return policy_loss(new, new.detach(), rewards, mask, (0.2, 0.2))[0]

    same(policy.gradient(policy.mean_over_words(loss_of)), policy.gradient(policy.kl()))


def objective(policy: Categorical, scores: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """E[score] - kl_coef * KL(policy, reference)."""
    return (policy.logprobs.exp() * scores).sum() - kl_coef * policy.kl()


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_leave_one_out_is_unbiased_and_a_group_mean_takes_one_part_in_k(seed: int, group_size: int) -> None:
    policy = Categorical(seed)
    ascent = policy.gradient(objective(policy, SCORES, KL_COEF))

    unbiased = policy.mean_over_groups(SCORES, group_size, ADVANTAGES["rloo"], KL_COEF)
    same(policy.gradient(unbiased), -ascent)
    smaller = policy.mean_over_groups(SCORES, group_size, ADVANTAGES["grpo without std"], KL_COEF)
    same(policy.gradient(smaller), -ascent * (group_size - 1) / group_size)


@pytest.mark.parametrize("name", ["rloo", "grpo without std"])
def test_with_the_kl_in_the_reward_the_optimum_is_the_reference_times_exp_of_scores(name: str) -> None:
    optimum = Categorical(0, logits=Categorical(0).ref + SCORES / KL_COEF)
    at_optimum = optimum.mean_over_groups(SCORES, 2, ADVANTAGES[name], KL_COEF)
    same(optimum.gradient(at_optimum), torch.zeros(WORDS, dtype=torch.float64))
    initial = Categorical(0, logits=Categorical(0).ref)
    at_reference = initial.mean_over_groups(SCORES, 2, ADVANTAGES[name], KL_COEF)
    assert initial.gradient(at_reference).abs().max() > 0.01


@pytest.mark.parametrize("group_size", [2, 3])
def test_with_k2_in_the_loss_grpo_without_std_weighs_the_kl_k_over_k_minus_one_as_much(group_size: int) -> None:
    # The mean of a group holds each response's own reward, which takes 1 / k of the scores' gradient, not of the KL's.
    mask = torch.ones(1, 1, dtype=torch.bool)

    def gradient_at(weight: float) -> torch.Tensor:
        policy = Categorical(0, logits=Categorical(0).ref + weight * SCORES / KL_COEF)
        by_score = policy.mean_over_groups(SCORES, group_size, ADVANTAGES["grpo without std"], kl_coef=0.0)
        by_kl = policy.mean_over_words(lambda new, ref: kl_loss(new, ref, mask, "k2"))
        return policy.gradient(by_score + KL_COEF * by_kl)

    same(gradient_at((group_size - 1) / group_size), torch.zeros(WORDS, dtype=torch.float64))
    assert gradient_at(1.0).abs().max() > 0.01


def test_k3_in_the_loss_has_another_optimum() -> None:
    # The gradient of KL(reference, policy) is policy - reference. So at the optimum, for each word,
    # policy * (mean score - score) = KL_COEF * (reference - policy), from which the policy follows but for a constant.
    mask = torch.ones(1, 1, dtype=torch.bool)
    ref = Categorical(0).ref.exp()
    low, high = float(SCORES.max()), 10.0
    for _ in range(200):
        multiplier = (low + high) / 2
        total = (KL_COEF * ref / (multiplier - SCORES)).sum()
        low, high = (multiplier, high) if total > 1 else (low, multiplier)

    policy = Categorical(0, logits=(KL_COEF * ref / (multiplier - SCORES)).log())
    by_score = policy.mean_over_groups(SCORES, 2, ADVANTAGES["rloo"], kl_coef=0.0)
    by_kl = policy.mean_over_words(lambda new, ref: kl_loss(new, ref, mask, "k3"))
    same(policy.gradient(by_score + KL_COEF * by_kl), torch.zeros(WORDS, dtype=torch.float64))
    tilted = (policy.ref + SCORES / KL_COEF).softmax(0)
    assert (policy.logprobs.exp() - tilted).abs().sum() / 2 > 0.05


def test_an_entropy_bonus_moves_the_optimum_where_it_should() -> None:
    # E[score] - KL_COEF * KL + bonus * H is largest at (reference^KL_COEF * exp(score))^(1 / (KL_COEF + bonus)).
    bonus = 0.2
    logits = (KL_COEF * Categorical(0).ref + SCORES) / (KL_COEF + bonus)
    policy = Categorical(0, logits=logits)
    loss = policy.mean_over_groups(SCORES, 2, ADVANTAGES["rloo"], KL_COEF)
    entropy = -(policy.logprobs.exp() * policy.logprobs).sum()
    same(policy.gradient(loss - bonus * entropy), torch.zeros(WORDS, dtype=torch.float64))


# Responses of two words of three: log-probs of the first (3,), and of the second after each first one (3, 3).
TwoWords = tuple[torch.Tensor, torch.Tensor]
PAIRS = torch.tensor([[0.9, -0.4, 0.2], [-0.6, 0.1, 0.5], [0.3, 0.8, -0.9]], dtype=torch.float64)


def entropies(logprobs: torch.Tensor) -> torch.Tensor:
    return -(logprobs.exp() * logprobs).sum(-1)


def largest_slope(policy: TwoWords, ref: TwoWords, kl_in: str, bonus: float) -> float:
    """The largest gradient of the mean over all responses of what an update minimises, with respect to the policy."""
    logits = [logprobs.detach().clone().requires_grad_() for logprobs in policy]
    first, second = (each.log_softmax(-1) for each in logits)
    mask = torch.ones(1, 2, dtype=torch.bool)
    total = torch.zeros((), dtype=torch.float64)
    for i, j in product(range(3), repeat=2):
        new = torch.stack([first[i], second[i, j]])[None]
        old = new.detach()
        reference = torch.stack([ref[0][i], ref[1][i, j]])[None]
        rewards = token_rewards(PAIRS[i, j][None], old, reference, mask, KL_COEF if kl_in == "reward" else 0.0)
        loss, _ = policy_loss(new, old, rewards.sum(1, keepdim=True).expand(1, 2), mask, (0.2, 0.2))
        if kl_in == "loss":
            loss = loss + KL_COEF * kl_loss(new, reference, mask, "k2")
        loss = loss - bonus * (entropies(first) + entropies(second[i]))
        total = total + old.sum().exp() * loss
    return max(float(gradient.abs().max()) for gradient in torch.autograd.grad(total, logits))


def optimum_of(ref: TwoWords, bonus: float, counts_later_kl: bool, counts_later_entropy: bool) -> TwoWords:
    """The best policy if a first word answers for the scores, and maybe the KL and the entropy, of what follows it."""
    second = ((KL_COEF * ref[1] + PAIRS) / (KL_COEF + bonus)).log_softmax(1)
    value = (second.exp() * PAIRS).sum(1)
    value = value - counts_later_kl * KL_COEF * (second.exp() * (second - ref[1])).sum(1)
    value = value + counts_later_entropy * bonus * entropies(second)
    return ((KL_COEF * ref[0] + value) / (KL_COEF + bonus)).log_softmax(0), second


@pytest.mark.parametrize(("kl_in", "bonus"), [("reward", 0.0), ("loss", 0.0), ("reward", 0.2), ("loss", 0.2)])
def test_a_first_word_answers_for_the_kl_of_the_second_in_the_reward_alone_and_never_for_its_entropy(
    kl_in: str, bonus: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    ref = (drawn[0], drawn[1:])

    aimed_at = optimum_of(ref, bonus, counts_later_kl=kl_in == "reward", counts_later_entropy=False)
    assert largest_slope(aimed_at, ref, kl_in, bonus) < 1e-12
    of_whole_responses = optimum_of(ref, bonus, counts_later_kl=True, counts_later_entropy=True)
    joint = (of_whole_responses[0][:, None] + of_whole_responses[1]).flatten()
    references = (ref[0][:, None] + ref[1]).flatten()
    same(joint, ((KL_COEF * references + PAIRS.flatten()) / (KL_COEF + bonus)).log_softmax(0))
    is_aimed_at = kl_in == "reward" and bonus == 0
    assert (largest_slope(of_whole_responses, ref, kl_in, bonus) < 1e-3) == is_aimed_at


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_the_policy_gradient_of_tail_scores_is_the_gradient_of_the_cvar(share: float) -> None:
    # A batch of 20 words, each as often as the policy has it, so that its mean is the expectation.
    counts = torch.tensor([6, 5, 4, 3, 2])
    words = torch.arange(WORDS).repeat_interleave(counts)
    policy = Categorical(0, logits=(counts / 20).double().log())

    logprobs = policy.logprobs[words][:, None]
    advantages = tail_scores(SCORES[words], share)[:, None]
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, mask, (0.2, 0.2))

    def cvar(logits: torch.Tensor) -> float:
        chances = logits.softmax(0)
        below = [(chances * (score - SCORES).clamp_min(0)).sum() / share for score in SCORES]
        return max(float(score - part) for score, part in zip(SCORES, below, strict=True))

    step = 1e-6
    slopes = []
    for direction in torch.eye(WORDS, dtype=torch.float64):
        logits = policy.logits.detach()
        slopes.append((cvar(logits + step * direction) - cvar(logits - step * direction)) / (2 * step))
    same(policy.gradient(loss / 20), -torch.tensor(slopes, dtype=torch.float64), tolerance=1e-7)


def test_a_share_of_all_leaves_scores_as_they_are_to_the_last_bit() -> None:
    scores = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tail_scores(scores, 1.0), scores)
