"""What failures look like in the metrics: each is made on purpose, and shows itself as docs/metrics.md says.

`pytest tests/training/test_failures.py -s` prints the figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Make, prompted_rows
from detoxrl.config.schema import Config
from detoxrl.models.plain import PlainNetwork
from detoxrl.models.policy import Policy, Scored
from detoxrl.models.types import Encoded
from detoxrl.training import learner as learner_module
from detoxrl.training import rollout as rollout_module
from detoxrl.training.learner import Learner
from detoxrl.training.train import train
from learning import learn, loop_config, run_of

Records = list[dict[str, float]]


def shown(what: str, records: Records, *keys: str) -> None:
    for key in keys:
        print(f"{what}: {key}", *(f"{record[key]:.3g}" for record in records[:: max(1, len(records) // 6)]))


def learning(**rl: object) -> Config:
    """Enough steps, fast enough, for a tiny policy to show where it goes."""
    given = {"steps": 20, "lr": 4e-2, "kl_coef": 0.0, "batch_size": 32, "minibatch_size": 32, "microbatch_size": 32}
    return loop_config(**{**given, "update_kl_limit": None, **rl})


@pytest.fixture
def policy(make_policy: Make) -> Policy:
    return make_policy("t5", "fresh")


def test_the_wrong_reference_shows_as_kl_at_the_first_step(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("t5", "loaded")
    logprobs = policy.logprobs

    def of_the_bare_base(
        encoded: Encoded, ids: torch.Tensor, temperature: float, adapter: str | None = "default", **settings: Any
    ) -> Scored:
        adapter = None if adapter == policy.reference else adapter
        return logprobs(encoded, ids, temperature, adapter, **settings)

    monkeypatch.setattr(policy, "logprobs", of_the_bare_base)
    records = learn(policy, tmp_path, loop_config())
    shown("wrong reference", records, "kl/reference")
    assert records[0]["kl/reference"] > 1


def test_tokens_scored_that_were_not_sampled_show_as_negative_kl(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = rollout_module.collect_rollout

    def other_tokens(policy: Policy, *others: object, **named: object) -> object:
        """Score other ids than were sampled, as decoding and encoding anew or a lost start token would."""
        sampled = collect(policy, *others, **named)  # type: ignore[arg-type]
        ids, mask = (sampled.responses.ids + 1) % 299, sampled.responses.response_mask
        with torch.no_grad():
            logprobs, ref = (policy.logprobs(sampled.encoded, ids, 1.0, name)[0] for name in ("default", None))
        scored = replace(sampled.responses, ids=ids, logprobs=torch.where(mask, logprobs, 0.0))
        return replace(sampled, responses=scored, ref_logprobs=torch.where(mask, ref, 0.0))

    monkeypatch.setattr(learner_module, "collect_rollout", other_tokens)
    policy.eos_token_ids = [1]
    records = learn(policy, tmp_path, learning())
    shown("tokens never sampled", records, "kl/reference", "kl/k3", "ratio/first_error")
    assert min(record["kl/reference"] for record in records) < -0.5
    assert records[-1]["kl/k3"] > 0.5
    assert all(record["ratio/first_error"] < 1e-5 for record in records)  # it hides here: both sides are wrong alike


def test_dropout_in_the_update_shows_as_ratios_off_one(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = Learner._losses
    policy._network_class = PlainNetwork  # The fast T5 has no dropout that could be on.

    def in_train_mode(learner: Learner, *others: object) -> object:
        policy.model.train()
        found = losses(learner, *others)  # type: ignore[arg-type]
        policy.model.eval()
        return found

    monkeypatch.setattr(Learner, "_losses", in_train_mode)
    records = learn(policy, tmp_path, loop_config())
    assert "sampling and update disagree" in " ".join(capsys.readouterr().err.split())
    shown("dropout in the update", records, "ratio/first_error", "ratio/max")
    assert all(record["ratio/first_error"] > 0.05 for record in records)


def test_too_large_a_learning_rate_shows_as_ratio_spikes_and_clipping(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = learn(policy, tmp_path, learning(max_grad_norm=1e9, lr=0.3, steps=6))
    shown("lr too large", records, "ratio/max", "clip_fraction", "kl/update", "entropy")
    assert "a lower rl.lr may help" in " ".join(capsys.readouterr().err.split())
    assert records[0]["ratio/max"] > 10
    assert records[0]["clip_fraction"] > 0.2


def test_a_reward_for_brevity_shows_as_length_collapse(make_policy: Make, tmp_path: Path) -> None:
    def brevity(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        return torch.tensor([-float(len(response)) for response in responses])

    config = learning(steps=30, lam=1.0, batch_size=64, minibatch_size=64)
    reward = replace(config.reward, empty_score=10.0, missing_eos_penalty=0.0)  # the rule that forbids it, reversed
    records = learn(make_policy("gpt2", "fresh"), tmp_path, replace(config, reward=reward), brevity)
    shown("brevity", records, "score/mean", "response_length/mean", "empty_rate", "eos_rate")
    assert records[-1]["score/mean"] > records[0]["score/mean"]
    assert records[-1]["response_length/mean"] < 0.5 * records[0]["response_length/mean"]
    assert records[-1]["eos_rate"] > 0.9 > 0.6 > records[0]["eos_rate"]


def test_a_gamed_reward_shows_as_a_score_that_rises_while_the_judge_is_flat(policy: Policy, tmp_path: Path) -> None:
    def share_of_spaces(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([text.count(" ") / max(len(text), 1) for text in texts])

    records = learn(policy, tmp_path, learning(validate_every=4), judge=share_of_spaces)
    with (tmp_path / "validation.jsonl").open() as lines:
        judged = [json.loads(line) for line in lines]
    shown("gamed", records, "score/mean", "entropy", "kl/reference")
    shown("gamed", judged, "toxicity", "toxicity_error")
    assert records[-1]["score/mean"] > 4 * records[0]["score/mean"]
    assert abs(judged[-1]["toxicity"] - judged[0]["toxicity"]) < 3 * judged[0]["toxicity_error"]
    assert records[-1]["entropy"] < 0.7 * records[0]["entropy"]


def test_a_run_driven_too_far_shows_as_score_and_judge_that_part(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def far_from_a_fifth(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """A judge that the reward, the share of e, pleases up to a fifth and not beyond."""
        return np.array([abs(text.count("e") / max(len(text), 1) - 0.2) for text in texts])

    rows = prompted_rows({"train": 32, "validation": 32})
    config = learning(validate_every=2, steps=24)
    train(run_of(policy, tmp_path, config, judge=far_from_a_fifth, rows=rows))
    ended = json.loads((tmp_path / "checkpoint.json").read_text())
    with (tmp_path / "validation.jsonl").open() as lines:
        judged = [json.loads(line) for line in lines]
    assert 0 < ended["kept_step"] < ended["parted_step"] < 24
    assert judged[-1]["score"] > judged[ended["kept_step"] // 2]["score"] > judged[0]["score"]
    assert judged[-1]["toxicity"] > 1.5 * judged[ended["kept_step"] // 2]["toxicity"]
    assert abs(judged[0]["kl"]) < 1e-4 < 1 < judged[-1]["kl"]
    told = " ".join(capsys.readouterr().err.split())
    shown("too far", judged, "score", "toxicity", "toxicity_error", "kl")
    print(f"too far: kept {ended['kept_step']}, parted {ended['parted_step']}")
    assert f"train: reward and judge diverge from step {ended['parted_step']} on: the score is above" in told


def test_a_critic_that_learns_too_fast_shows_as_explained_variance_below_zero(policy: Policy, tmp_path: Path) -> None:
    records = learn(policy, tmp_path, learning(value_lr=3.0, value_clip=1e9, value_coef=10.0, steps=6))
    shown("hasty critic", records, "value/explained_variance", "value/loss")
    assert min(record["value/explained_variance"] for record in records) < -1
