"""A problem whose answer is known: one token, eight scored words, KL in the reward, through the shipped loop.

The policy that maximises E[score] - kl_coef * KL(policy, reference) is reference * exp(score / kl_coef), normalised
(Ziegler et al. 2019, section 2; Rafailov et al. 2023, equation 4). `pytest tests/test_bandit.py -s` prints distances.
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
from detoxrl.config import Config, GenerationConfig, RewardConfig, RlConfig
from detoxrl.data.rows import Row
from detoxrl.policy.adapters import load_policy
from detoxrl.policy.backbone import save_base
from detoxrl.policy.policy import Policy
from detoxrl.policy.weights import POLICY
from detoxrl.tracking import RunFolder
from detoxrl.train import train

SPECIAL = ("<pad>", "</s>", "<unk>")
SCORES = {"very": 0.9, "kind": 0.5, "of": 0.1, "you": -0.3, "gold": 0.7, "grey": -0.8, "pink": 0.3, "teal": -0.1}
EMPTY, KL_COEF, PROMPT = -0.5, 0.5, "kind of gold"
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


def settings(kind: str, seed: int) -> Config:
    return Config(
        recipe="own",
        seed=seed,
        reward=RewardConfig(normalise_on=0, missing_eos_penalty=0.0, empty_score=EMPTY),
        generation=GenerationConfig(max_new_tokens=1),
        rl=RlConfig(
            steps=50, batch_size=64, minibatch_size=32, microbatch_size=32, epochs=1, lr=LR[kind], value_lr=0.1,
            kl_coef=KL_COEF, update_kl_limit=None, validate_every=100,
        ),
    )  # fmt: skip


def score(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    # What is no word is empty text: the rule for it gives the score, whatever stands here.
    return torch.tensor([SCORES.get(response, 99.0) for response in responses])


def probabilities(policy: Policy, adapter: str | None) -> torch.Tensor:
    tokens = torch.arange(len(SPECIAL) + len(SCORES))[:, None]
    with torch.no_grad():
        encoded = policy.encode([PROMPT] * len(tokens), adapter)
        return policy.logprobs(encoded, tokens, 1.0, adapter)[0].double().exp()[:, 0]


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p - q).abs().sum() / 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "kind"), [("t5", "loaded"), ("bart", "fresh"), ("gpt2", "full"), ("llama", "fresh")], ids=str
)
def test_the_loop_finds_the_known_optimum(name: str, kind: str, seed: int, tmp_path: Path) -> None:
    policy = bandit(tmp_path, name, kind, seed)
    reference = probabilities(policy, policy.reference)
    tilt = torch.tensor([EMPTY] * len(SPECIAL) + list(SCORES.values())).double() / KL_COEF
    optimum = (reference.log() + tilt).softmax(0)
    rows = [Row(id=str(i), dialogue=PROMPT, summary=None, prompt=PROMPT) for i in range(64)]
    train(
        RunFolder(tmp_path), settings(kind, seed), policy, score, lambda texts: np.linspace(0, 1, len(texts)),
        rows, rows[:2],
    )  # fmt: skip
    start, end = total_variation(reference, optimum), total_variation(probabilities(policy, POLICY), optimum)
    print(f"{name:5} {kind:6} seed {seed}: total variation to the optimum {start:.3f} -> {end:.3f}")
    assert start > 0.15
    assert end < 0.05
    assert torch.equal(reference, probabilities(policy, policy.reference))
