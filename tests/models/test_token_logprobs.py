"""The language-model head in chunks: log-probs, entropies, and the gradients of both, against plain float64."""

from __future__ import annotations

import pytest
import torch

import twin
from detoxrl.models import token_logprobs
from detoxrl.models.token_logprobs import entropies_of, select_tokens

TOKENS, WIDTH, VOCABULARY = 7, 5, 13
# Chunks of one row, of three rows, and of all rows.
LIMITS = (1, 3 * VOCABULARY, 4_000_000)
# What each output's gradient is weighed with, by the place of a token: log-probs alone, entropies alone, or both.
WEIGHTS = {
    "log-probs": (1.0, 0.0),
    "entropies": (0.0, 1.0),
    "both": (0.7, -1.3),
}


class Head:
    """Random states, head and ids, and what autograd gives for them in float64."""

    def __init__(self, seed: int, temperature: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.temperature = temperature
        self.states = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
        self.head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
        self.ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        self.by_token = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)

    def plain(self, states: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.log_softmax(states @ head.t() / self.temperature, dim=-1)
        chosen = logprobs[torch.arange(TOKENS), self.ids]
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    def total(self, outputs: tuple[torch.Tensor, torch.Tensor], weights: tuple[float, float]) -> torch.Tensor:
        logprobs, entropies = outputs
        by_logprob, by_entropy = self.by_token.to(logprobs.dtype)
        return weights[0] * (by_logprob * logprobs).sum() + weights[1] * (by_entropy * entropies).sum()


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen_head", "trained_head"])
def test_log_probs_and_entropies_are_those_of_softmax(
    trains: bool, entropy_gradient: bool, temperature: float, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", limit)
    exact = Head(0, temperature)
    head = exact.head.float().requires_grad_(trains)
    states = exact.states.float().requires_grad_()
    logprobs, entropies = token_logprobs.token_logprobs(states, head, exact.ids, temperature, entropy_gradient)

    expected, _ = exact.plain(exact.states, exact.head)
    near(logprobs.detach(), expected)
    logits = (exact.states @ exact.head.t()).tolist()
    near(entropies.detach(), torch.tensor([twin.entropy(row, temperature) for row in logits], dtype=torch.float64))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen_head", "trained_head"])
def test_gradients_of_both_are_those_of_autograd_in_float64(
    trains: bool, temperature: float, limit: int, weights: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", limit)
    for seed in range(3):
        exact = Head(seed, temperature)
        inputs = [exact.states.clone().requires_grad_(), exact.head.clone().requires_grad_()][: 1 + trains]
        head = inputs[1] if trains else exact.head
        expected = torch.autograd.grad(exact.total(exact.plain(inputs[0], head), weights), inputs)

        single = [exact.states.float().requires_grad_(), exact.head.float().requires_grad_()][: 1 + trains]
        head = single[1] if trains else exact.head.float()
        outputs = token_logprobs.token_logprobs(single[0], head, exact.ids, temperature, entropy_gradient=True)
        actual = torch.autograd.grad(exact.total(outputs, weights), single)
        for ours, theirs in zip(actual, expected, strict=True):
            near(ours, theirs)
            assert theirs.abs().max() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_gradient_of_an_entropy_is_its_slope(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", 2 * VOCABULARY)
    exact = Head(0, temperature)
    states = exact.states.float().requires_grad_()
    _, entropies = token_logprobs.token_logprobs(states, exact.head.float(), exact.ids, temperature, True)
    (gradient,) = torch.autograd.grad(entropies.sum(), states)

    def entropy_of(state: torch.Tensor) -> float:
        return twin.entropy((exact.head @ state).tolist(), temperature)

    step = 1e-6
    for row in range(TOKENS):
        for direction in range(WIDTH):
            change = torch.zeros(WIDTH, dtype=torch.float64)
            change[direction] = step
            rise = entropy_of(exact.states[row] + change) - entropy_of(exact.states[row] - change)
            assert gradient[row, direction].item() == pytest.approx(rise / (2 * step), abs=1e-5)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen_head", "trained_head"])
def test_without_the_flag_entropies_have_no_gradient_and_log_probs_the_same_one(trains: bool) -> None:
    exact = Head(0, 0.6)
    states = exact.states.float().requires_grad_()
    head = exact.head.float().requires_grad_(trains)
    gradients = []
    for flag in (False, True):
        logprobs, entropies = token_logprobs.token_logprobs(states, head, exact.ids, 0.6, entropy_gradient=flag)
        assert entropies.requires_grad == flag
        gradients.append(torch.autograd.grad(logprobs.sum(), states)[0])
    near(gradients[0], gradients[1].double(), 1e-6)

    logprobs, entropies = token_logprobs.token_logprobs(states, head, exact.ids, 0.6)
    (with_entropies,) = torch.autograd.grad((logprobs + entropies).sum(), states)
    assert torch.equal(with_entropies, gradients[0])


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_nothing_is_saved_where_no_gradient_is_needed(entropy_gradient: bool) -> None:
    exact = Head(0, 0.6)
    for states in (exact.states.float(), exact.states.float().requires_grad_()):
        with torch.no_grad():
            outputs = token_logprobs.token_logprobs(states, exact.head.float(), exact.ids, 0.6, entropy_gradient)
        assert not any(output.requires_grad for output in outputs)


def test_what_is_saved_for_the_backward_pass_has_no_logits() -> None:
    exact = Head(0, 0.6)
    states = exact.states.float().requires_grad_()
    for flag, number in ((False, 1), (True, 2)):
        logprobs, _ = token_logprobs.token_logprobs(states, exact.head.float(), exact.ids, 0.6, flag)
        assert logprobs.grad_fn is not None
        saved = logprobs.grad_fn.saved_tensors  # type: ignore[attr-defined]
        assert [tensor.shape for tensor in saved] == [(TOKENS, WIDTH)] * number


def test_a_head_that_trains_is_read_in_chunks_where_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Head(0, 0.6)
    rows, multiply = [], token_logprobs.linear

    def counting(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return multiply(x, weight)

    monkeypatch.setattr(token_logprobs, "linear", counting)
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", 3 * VOCABULARY)
    head = exact.head.float().requires_grad_()
    with torch.no_grad():
        token_logprobs.token_logprobs(exact.states.float(), head, exact.ids, 0.6)
    assert rows == [3, 3, 1]


def test_the_entropy_of_a_sure_and_of_a_uniform_distribution() -> None:
    head = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    states = torch.tensor([[200.0], [0.0]], requires_grad=True)
    _, entropies = token_logprobs.token_logprobs(states, head, torch.tensor([1, 1]), 1.0, entropy_gradient=True)
    assert entropies.tolist() == pytest.approx([0.0, 2 * 0.6931472])
    (gradient,) = torch.autograd.grad(entropies.sum(), states)
    assert gradient.tolist() == [[0.0], [0.0]]  # and no NaN, though a probability is 0 in float32


def test_entropies_of_log_probs_by_hand() -> None:
    logprobs = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    with_gradient = entropies_of(logprobs, with_gradient=True)
    without = entropies_of(logprobs, with_gradient=False)
    assert with_gradient.tolist() == without.tolist() == pytest.approx([1.5 * 0.6931472])
    assert with_gradient.requires_grad
    assert not without.requires_grad
    assert logprobs.detach().exp().tolist() == [[0.5, 0.25, 0.25]]  # not changed in place


def test_tokens_are_chosen_by_a_mask_or_all_in_order() -> None:
    values = torch.arange(12).view(2, 3, 2)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert select_tokens(values, mask).tolist() == [[0, 1], [4, 5], [8, 9]]
    assert select_tokens(values, None).tolist() == values.view(6, 2).tolist()
    assert select_tokens(values[..., 0], mask).tolist() == [0, 4, 8]
