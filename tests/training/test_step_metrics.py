"""What is logged of a step, by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from detoxrl.errors import TrainingError
from detoxrl.models.types import Encoded, Prompt, Responses, Rollout
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training import metrics
from detoxrl.training.metrics import StepTimer, Totals, log_samples, require_finite, rollout_metrics, warn_of_ratios


def part(tokens: float, ratio_max: float, ratio_min: float, **sums: float) -> dict[str, float]:
    others = {"policy": 0.0, "value": 0.0, "clipped": 0.0, "entropy": 0.0, "kl": 0.0, "ratio": 0.0}
    return others | {"tokens": tokens, "ratio_max": ratio_max, "ratio_min": ratio_min} | sums


def test_totals_are_means_over_tokens() -> None:
    totals = Totals()
    whole = {"policy": 6.0, "value": 3.0, "clipped": 1.0, "entropy": 9.0, "kl": 0.3, "ratio": 3.3}
    half = {name: value / 2 for name, value in whole.items()}
    totals.add([part(1, 0.8, 0.6, **half), part(2, 0.7, 0.5, **half)], gradient_norm=2.0)
    assert totals.pass_kl() == pytest.approx(0.1)
    last = part(1, 0.9, 0.9, policy=-2.0, value=1.0, clipped=1.0, entropy=1.0, kl=0.5, ratio=4.0)
    totals.add([last], gradient_norm=4.0)
    assert totals.pass_kl() == pytest.approx(0.5)
    assert totals.metrics(epochs=2) == pytest.approx(
        {
            "policy/loss": 1.0, "value/loss": 1.0, "clip_fraction": 0.5, "entropy": 2.5, "kl/update": 0.2,
            "ratio/mean": 1.825, "ratio/max": 0.9, "ratio/first_error": 0.5, "grad_norm": 3.0, "epochs": 2.0,
        }
    )  # fmt: skip


def test_the_first_error_looks_both_ways_through_the_whole_first_minibatch_and_no_further() -> None:
    totals = Totals()
    totals.add([part(1, 1.1, 0.98), part(1, 1.0, 0.7), part(1, 1.0, 1.0)], gradient_norm=1.0)
    assert totals.first_error == pytest.approx(0.3)
    totals.add([part(1, 9.0, 0.1)], gradient_norm=1.0)
    assert totals.first_error == pytest.approx(0.3)

    above = Totals()
    above.add([part(1, 1.1, 0.98)], gradient_norm=1.0)
    assert above.first_error == pytest.approx(0.1)


def rollout() -> Rollout:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]])
    ref = torch.tensor([[-1.5, -2.0, -4.0], [-2.0, 0.0, 0.0]])
    responses = Responses(
        ids=torch.ones(2, 3).long(), response_mask=mask, logprobs=logprobs, values=torch.zeros(2, 3),
        ended=torch.tensor([False, True]),
    )  # fmt: skip
    encoded = Encoded(states=torch.zeros(2, 1, 1), mask=torch.ones(2, 1).long())
    prompts = [Prompt(id="a", text="one"), Prompt(id="b", text="two")]
    return Rollout(prompts=prompts, encoded=encoded, responses=responses, texts=["yes", ""], ref_logprobs=ref)


def test_the_statistics_of_a_rollout_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.0, 2.0], [-1.0, 0.0, 0.0]])
    found = rollout_metrics(rollout(), torch.tensor([1.0, 3.0]), torch.tensor([0.5, -2.5]), rewards)
    k3 = [0.1065307, 0.0, 0.3678794, 0.3678794]  # exp(-d) - 1 + d for d = 0.5, 0, 1 and 1
    assert found == pytest.approx(
        {
            "score/mean": 2.0, "score/std": 2**0.5, "score/shaped": -1.0, "reward/mean": 0.5,
            "kl/reference": (0.5 + 0.0 + 1.0 + 1.0) / 2, "kl/k3": sum(k3) / 4, "eos_rate": 0.5, "empty_rate": 0.5,
            "response_length/mean": 2.0, "response_length/max": 3.0,
        },
        rel=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_statistic_may_be_other_than_a_number(value: float) -> None:
    require_finite({"score/mean": 0.0, "kl/reference": -3e38}, 4)
    with pytest.raises(TrainingError, match=f"stopped at step 4: kl/reference is {value}; a lower"):
        require_finite({"score/mean": 0.0, "kl/reference": value}, 4)


@pytest.mark.parametrize(
    ("error", "highest", "bf16", "told"),
    [
        (0.01, 10.0, False, ""),
        (0.011, 99.0, False, "step 3: first ratios are 0.011 off 1: sampling and update disagree, see docs/metrics.md"),
        (0.0, 10.1, False, "step 3: the largest ratio is 10; a lower rl.lr may help"),
        (0.2, 10.0, True, ""),
        (0.21, 10.0, True, "step 3: first ratios are 0.21 off 1: sampling and update disagree, see docs/metrics.md"),
    ],
)
def test_ratios_that_no_healthy_step_has_are_told(
    error: float, highest: float, bf16: bool, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_ratios({"ratio/first_error": error, "ratio/max": highest}, 3, bf16)
    assert " ".join(capsys.readouterr().err.split()) == told


def test_the_first_responses_of_a_step_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_LOGGED_SAMPLES", 1)
    log_samples(RunFolder(tmp_path), rollout(), torch.tensor([1.0, 3.0]), step=7)
    assert json.loads((tmp_path / "rollouts.jsonl").read_text()) == {
        "step": 7,
        "id": "a",
        "response": "yes",
        "score": 1.0,
    }


def test_a_timer_tells_seconds_by_stage_and_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.0, 12.0, 13.0, 16.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    timer = StepTimer()
    with timer.stage("sample"):
        pass
    with timer.stage("update"):
        pass
    assert timer.metrics(tokens=50) == {
        "seconds/sample": 2.0, "seconds/update": 3.0, "seconds/step": 10.0, "tokens_per_second": 5.0,
    }  # fmt: skip
