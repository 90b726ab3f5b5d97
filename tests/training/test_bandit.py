"""Problems whose answer is known: one token of eight scored words, or two in a row, with KL in the reward.

The policy that maximises E[score] - kl_coef * KL(policy, reference) is reference * exp(score / kl_coef), normalised
(Ziegler et al. 2019, section 2; Rafailov et al. 2023, equation 4), over whole responses. The shipped loop has to find
it. `pytest tests/training/test_bandit.py -s` prints distances.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def distances(folder: Path, policy: Policy, config: Config, length: int) -> tuple[float, float]:
    """Train, and return the total variation to the optimum before and after."""
    responses, words = every_response(length), (*[""] * len(SPECIAL), *SCORES)
    scores = torch.tensor([score_of([words[i] for i in ids if i >= len(SPECIAL)]) for ids in responses]).double()
    reference = logprobs(policy, policy.reference, responses)
    assert reference.exp().sum().item() == pytest.approx(1)
    optimum = (reference + scores / KL_COEF).softmax(0)
    rows = [Row(id=str(i), text=PROMPT, prompt=PROMPT) for i in range(config.rl.batch_size)]

    def judge(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.linspace(0, 1, len(texts))

    train(run_of(policy, folder, config, score, judge, {"train": rows, "validation": rows[:2]}))
    assert torch.equal(reference, logprobs(policy, policy.reference, responses))
    start, end = (float((p.exp() - optimum).abs().sum() / 2) for p in (reference, logprobs(policy, POLICY, responses)))
    return start, end


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
    config = settings("full", seed, length=2, steps=80, batch_size=128, minibatch_size=64, microbatch_size=64)
    start, end = distances(tmp_path, bandit(tmp_path, "gpt2", "full", seed), config, length=2)
    print(f"gpt2  full   seed {seed}, 111 responses: total variation to the optimum {start:.3f} -> {end:.3f}")
    assert start > 0.15
    assert end < 0.05
