"""Problems whose answer is known: one token of eight scored words, or two in a row.

The policy that maximises E[score] - kl_coef * KL(policy, reference) is reference * exp(score / kl_coef), normalised
(Ziegler et al. 2019, section 2; Rafailov et al. 2023, equation 4), over whole responses. The shipped loop has to find
it with every algorithm that aims at it, and the optimum of what else a setting makes it maximise.
`pytest tests/training/test_bandit.py -s` prints distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import TINY, disturb, policy_config
from detoxrl.config.schema import Config, GenerationConfig, RewardConfig, RlConfig
from detoxrl.data.rows import Row
from detoxrl.models.loading import save_base
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.weights import POLICY
from detoxrl.training.train import train
from learning import run_of

SPECIAL = ("<pad>", "</s>", "<unk>")
SCORES = {"very": 0.9, "kind": 0.5, "of": 0.1, "you": -0.3, "gold": 0.7, "grey": -0.8, "pink": 0.3, "teal": -0.1}
EOS, EMPTY, KL_COEF, PROMPT = 1, -0.5, 0.5, "kind of gold"
LR = {"fresh": 3e-2, "loaded": 3e-2, "full": 3e-3}
LARGER = {"steps": 80, "batch_size": 128, "minibatch_size": 64, "microbatch_size": 64}

Optimum = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(log-probs of all responses under the reference, their scores) -> the probabilities of the best policy."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *SCORES))}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def bandit(folder: Path, name: str, kind: str, seed: int) -> Policy:
    torch.manual_seed(seed)
    save_base(TINY[name](len(SPECIAL) + len(SCORES)), word_tokenizer(), folder / "base")
    config = policy_config(name, full=kind == "full")
    start = None
    if kind == "loaded":
        trained = load_policy(str(folder / "base"), None, config, seed)
        disturb(trained)
        trained.save(folder / "start")
        start = folder / "start"
    return load_policy(str(folder / "base"), start, config, seed)


def settings(kind: str, seed: int, length: int, **rl: object) -> Config:
    small: dict[str, object] = {"steps": 50, "batch_size": 64, "minibatch_size": 32, "microbatch_size": 32}
    small |= {"epochs": 1, "validate_every": 100}
    return Config(
        recipe="own",
        seed=seed,
        reward=RewardConfig(normalise_on=0, missing_eos_penalty=0.0, empty_score=EMPTY),
        generation=GenerationConfig(max_new_tokens=length),
        rl=RlConfig(
            **(small | {"lr": LR[kind], "value_lr": 0.1, "kl_coef": KL_COEF, "update_kl_limit": None} | rl)  # type: ignore[arg-type]
        ),
    )


def score(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """The mean of the words, but some pairs are worth more or less than that; the rule for empty text gives EMPTY."""
    return torch.tensor([score_of(response.split()) if response else 99.0 for response in responses])


def score_of(words: Sequence[str]) -> float:
    if not words:
        return EMPTY
    pair = {("grey", "very"): 0.5, ("kind", "kind"): -0.6}.get(tuple(words), 0.0)  # type: ignore[call-overload]
    return float(sum(SCORES[word] for word in words) / len(words) + pair)


def every_response(length: int) -> list[list[int]]:
    """Ids of all responses of up to `length` (1 or 2) tokens: EOS ends one."""
    tokens = range(len(SPECIAL) + len(SCORES))
    if length == 1:
        return [[token] for token in tokens]
    return [[EOS], *([first, second] for first in tokens if first != EOS for second in tokens)]


def logprobs(policy: Policy, adapter: str | None, responses: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, responses))
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in responses])
    counts = torch.arange(longest) < torch.tensor([[len(ids)] for ids in responses])
    with torch.no_grad():
        found, _, _ = policy.logprobs(policy.encode([PROMPT] * len(ids), adapter), ids, 1.0, adapter)
    return torch.where(counts, found, 0.0).double().sum(1)


def scores_of(responses: list[list[int]]) -> torch.Tensor:
    words = (*[""] * len(SPECIAL), *SCORES)
    return torch.tensor([score_of([words[i] for i in ids if i >= len(SPECIAL)]) for ids in responses]).double()


def known_optimum(reference: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The probabilities of the policy that maximises E[score] - KL_COEF * KL, from the reference's log-probs."""
    return (reference + scores / KL_COEF).softmax(0)


def variation(one: torch.Tensor, other: torch.Tensor) -> float:
    """The total variation between two distributions."""
    return float((one - other).abs().sum() / 2)


def train_on(folder: Path, policy: Policy, config: Config, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Train, and return the probabilities of every response under the reference and under the policy."""
    responses = every_response(length)
    reference = logprobs(policy, policy.reference, responses)
    assert reference.exp().sum().item() == pytest.approx(1)
    rows = [Row(id=str(i), text=PROMPT, prompt=PROMPT) for i in range(config.rl.batch_size)]

    def judge(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.linspace(0, 1, len(texts))

    train(run_of(policy, folder, config, score, judge, {"train": rows, "validation": rows[:2]}))
    assert torch.equal(reference, logprobs(policy, policy.reference, responses))
    return reference.exp(), logprobs(policy, POLICY, responses).exp()


def distances(
    folder: Path, policy: Policy, config: Config, length: int, optimum_of: Optimum = known_optimum
) -> tuple[float, float]:
    """Train, and return the total variation to the optimum before and after."""
    before, after = train_on(folder, policy, config, length)
    optimum = optimum_of(before.log(), scores_of(every_response(length)))
    return variation(before, optimum), variation(after, optimum)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "kind"), [("t5", "loaded"), ("bart", "fresh"), ("gpt2", "full"), ("llama", "fresh")], ids=str
)
def test_the_loop_finds_the_known_optimum(name: str, kind: str, seed: int, tmp_path: Path) -> None:
    policy = bandit(tmp_path, name, kind, seed)
    start, end = distances(tmp_path, policy, settings(kind, seed, length=1), length=1)
    print(f"{name:5} {kind:6} seed {seed}, 11 tokens: total variation to the optimum {start:.3f} -> {end:.3f}")
    assert start > 0.15
    assert end < 0.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loop_finds_the_known_optimum_over_two_tokens(seed: int, tmp_path: Path) -> None:
    config = settings("full", seed, length=2, **LARGER)
    start, end = distances(tmp_path, bandit(tmp_path, "gpt2", "full", seed), config, length=2)
    print(f"gpt2  full   seed {seed}, 111 responses: total variation to the optimum {start:.3f} -> {end:.3f}")
    assert start > 0.15
    assert end < 0.05


# Algorithms that aim at the same optimum: the KL is part of the reward, and no group divides by its own deviation.
GROUPED: dict[str, dict[str, object]] = {
    "rloo": {"algorithm": "rloo"},
    "grpo": {"algorithm": "grpo", "kl_in": "reward", "std_scaling": False},
    "reinforce": {"algorithm": "reinforce"},
    "ppo with groups": {"algorithm": "ppo", "group_size": 4},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("algorithm", "name", "kind"),
    [("rloo", "t5", "loaded"), ("grpo", "llama", "fresh"), ("reinforce", "bart", "fresh"),
     ("ppo with groups", "gpt2", "full")],
)  # fmt: skip
def test_every_algorithm_finds_the_known_optimum(
    algorithm: str, name: str, kind: str, seed: int, tmp_path: Path
) -> None:
    config = settings(kind, seed, length=1, **GROUPED[algorithm])
    start, end = distances(tmp_path, bandit(tmp_path, name, kind, seed), config, length=1)
    print(f"{algorithm}, {name} {kind} seed {seed}: total variation to the optimum {start:.3f} -> {end:.3f}")
    assert start > 0.15
    assert end < 0.05


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "reinforce"])
def test_algorithms_without_a_critic_find_the_known_optimum_over_two_tokens(algorithm: str, tmp_path: Path) -> None:
    config = settings("full", 0, length=2, **LARGER, **GROUPED[algorithm])
    start, end = distances(tmp_path, bandit(tmp_path, "gpt2", "full", 0), config, length=2)
    print(f"{algorithm}, 111 responses: total variation to the optimum {start:.3f} -> {end:.3f}")
    assert start > 0.15
    assert end < 0.05


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize(("algorithm", "weight"), [("rloo", 1.0), ("grpo", 3 / 4)])
def test_with_k2_in_the_loss_the_optimum_is_the_known_one_but_for_what_a_group_mean_takes(
    algorithm: str, weight: float, seed: int, tmp_path: Path
) -> None:
    """A baseline that holds the response's own reward takes 1 / 4 of the gradient of the scores, not of the KL's loss.

    This is for one token. Over two, the loss is the KL of each token by itself: a first token has no gradient for the
    KL of the second token that it leads to, which it has in the reward. So the first token has another optimum.
    """
    in_loss = {"kl_in": "loss", "kl_estimator": "k2", "std_scaling": False}
    config = settings("full", seed, length=1, algorithm=algorithm, **in_loss, **LARGER)
    before, after = train_on(tmp_path, bandit(tmp_path, "gpt2", "full", seed), config, length=1)
    scores = scores_of(every_response(1))
    end = variation(after, known_optimum(before.log(), weight * scores))
    of_other = variation(after, known_optimum(before.log(), (1.75 - weight) * scores))
    print(f"{algorithm} seed {seed}: {end:.3f} to the optimum of {weight} score, {of_other:.3f} to the other's")
    assert end < 0.05
    assert of_other > 2 * end


@pytest.mark.parametrize("seed", [0, 1])
def test_an_entropy_bonus_has_its_known_optimum(seed: int, tmp_path: Path) -> None:
    """E[score] - kl_coef * KL + c * H is largest at (reference^kl_coef * exp(score))^(1 / (kl_coef + c)), normalised.

    This is for one token. Over two, the bonus is the entropy of each token by itself, as elsewhere in the field: a
    first token has no gradient for the entropy of the second token that it leads to.
    """
    bonus = 0.3
    config = settings("full", seed, length=1, algorithm="rloo", entropy_coef=bonus, steps=80)
    before, after = train_on(tmp_path, bandit(tmp_path, "gpt2", "full", seed), config, length=1)
    scores = scores_of(every_response(1))
    optimum = ((KL_COEF * before.log() + scores) / (KL_COEF + bonus)).softmax(0)
    end = variation(after, optimum)
    without_bonus = variation(after, known_optimum(before.log(), scores))
    print(f"seed {seed}: {end:.3f} to the optimum with the bonus, {without_bonus:.3f} to the one without")
    assert end < 0.05
    assert without_bonus > 0.15


def tail_optimum(reference: torch.Tensor, scores: torch.Tensor, share: float) -> tuple[torch.Tensor, float]:
    """The probabilities that maximise CVaR(score) - KL_COEF * KL, and their quantile at `share`.

    CVaR is the maximum over v of v + E[min(score - v, 0)] / share (Rockafellar and Uryasev 2000). With v fixed, the
    optimum is the known one of the scores min(score - v, 0) / share, with a value of v + KL_COEF * log of the mean of
    exp(score / KL_COEF) under the reference. Between two scores that is convex in v, so the best v is a score.
    """
    values = []
    policies = []
    for quantile in scores.unique():
        tilted = reference + (scores - quantile).clamp_max(0.0) / share / KL_COEF
        values.append(float(quantile + KL_COEF * tilted.logsumexp(0)))
        policies.append((tilted.softmax(0), float(quantile)))
    return policies[int(np.argmax(values))]


def spread(values: torch.Tensor) -> float:
    return float(values.max() - values.min())


@pytest.mark.parametrize("seed", [0, 2])
def test_a_tail_share_has_the_optimum_of_the_cvar(seed: int, tmp_path: Path) -> None:
    """Low scores become rare, and responses above the quantile keep the odds that they have under the reference.

    The CVaR is convex in the probabilities, so there may be local optima; the loop finds the best one here.
    """
    config = settings("full", seed, length=1, algorithm="rloo", tail_share=0.25, steps=80)
    before, after = train_on(tmp_path, bandit(tmp_path, "gpt2", "full", seed), config, length=1)
    scores = scores_of(every_response(1))
    optimum, quantile = tail_optimum(before.log(), scores, 0.25)
    of_mean = known_optimum(before.log(), scores)
    start, end = variation(before, optimum), variation(after, optimum)
    print(f"seed {seed}: total variation to the optimum of the CVaR {start:.3f} -> {end:.3f}")
    assert start > 0.15
    assert end < 0.05
    assert variation(after, of_mean) > 0.1

    worst = scores.argmin()
    assert after[worst] < before[worst] / 10
    above = scores >= quantile
    assert int(above.sum()) > 1
    assert spread((after / before)[above].log()) < 0.2
    assert spread((of_mean / before)[above].log()) > 0.3
