"""The loss of DPO: numbers derived by hand, an independent float64 twin, and properties."""

from __future__ import annotations

import math

import pytest
import torch

import twin
from detoxrl.rl.losses import dpo_loss


def test_dpo_loss_by_hand() -> None:
    # Margins of 2 and -4 nats; beta halves them: log(1 + e^-1) + log(1 + e^2).
    loss = dpo_loss(torch.tensor([1.0, -3.0]), torch.tensor([-1.0, 1.0]), beta=0.5)
    assert loss.item() == pytest.approx(0.313262 + 2.126928, abs=1e-6)


def test_without_a_margin_it_is_log_2_of_a_pair() -> None:
    ratios = torch.tensor([0.0, 5.0, -7.0])
    assert dpo_loss(ratios, ratios, 0.1).item() == pytest.approx(3 * math.log(2))


@pytest.mark.parametrize("seed", range(5))
def test_dpo_loss_equals_its_twin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (torch.randn(8, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = [1, 7, *torch.randint(1, 8, (6,), generator=generator).tolist()]
    mask = torch.arange(7)[None, :] < torch.tensor(lengths)[:, None]

    ratios = torch.where(mask, policy - reference, 0.0).sum(1).view(4, 2)
    ours = dpo_loss(ratios[:, 0], ratios[:, 1], 0.7)
    theirs = twin.dpo_loss(policy.tolist(), reference.tolist(), lengths, 0.7)
    assert ours.item() == pytest.approx(theirs, rel=1e-12)


def test_its_gradient_raises_the_best_and_lowers_the_worst_most_where_they_are_ordered_wrongly() -> None:
    best = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    worst = torch.tensor([2.0, 0.0, -2.0], requires_grad=True)
    of_best, of_worst = torch.autograd.grad(dpo_loss(best, worst, 0.5), [best, worst])

    # beta times the probability that the pair is the other way round
    wrong = torch.tensor([0.880797, 0.5, 0.119203])
    torch.testing.assert_close(of_best, -0.5 * wrong)
    torch.testing.assert_close(of_worst, 0.5 * wrong)


def test_a_large_margin_overflows_in_neither_direction() -> None:
    best = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo_loss(best, torch.zeros(2), 1.0)
    (gradient,) = torch.autograd.grad(loss, best)
    assert loss.item() == 1e4
    assert gradient.tolist() == [0.0, -1.0]
