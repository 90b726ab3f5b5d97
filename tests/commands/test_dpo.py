"""The DPO baseline in a whole run, through the real command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from conftest import TARGETS
from detoxrl.runtime.randomness import batch_indices
from detoxrl.training import finetune, own_samples, preferences
from detoxrl.training.preferences import PreferencePair, learn_preferences
from small_runs import detoxrl, own, same_end

BASELINES = ["--sft.baseline-steps", "3", "--sft.batch-size", "4", "--rl.steps", "1"]
WORDS = own("--reward.function", "rewards.py:brevity", *BASELINES)
SFT = ["sft", "run"]


def prepared(*words: str) -> None:
    assert detoxrl(["prepare", *WORDS[1:], *words, "--run-dir", "run"]) == 0


def calls_of_sampling(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note of how many prompts samples were drawn, each time."""
    calls: list[int] = []
    sample_all = own_samples.sample_all

    def noting(policy: object, prompts: list[object], *others: object) -> object:
        calls.append(len(prompts))
        return sample_all(policy, prompts, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(own_samples, "sample_all", noting)
    return calls


def test_it_is_trained_measured_and_reported(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_sampling(monkeypatch)
    learnt: list[PreferencePair] = []

    def noting(policy: object, pairs: list[PreferencePair], *others: object) -> object:
        learnt.extend(pairs)
        return learn_preferences(policy, pairs, *others)  # type: ignore[arg-type]

    monkeypatch.setattr("detoxrl.training.sft.learn_preferences", noting)
    assert detoxrl([*WORDS, "--run-dir", "run"]) == 0
    assert calls == [3]  # once for both baselines
    assert len(learnt) > 0
    assert all(len(pair.best.text) < len(pair.worst.text) for pair in learnt)

    weights = [(place / "run" / name / "adapter_model.safetensors").read_bytes() for name in ("expert", "dpo")]
    assert weights[0] != weights[1]
    assert not (place / "run/checkpoints/sft").exists()
    found = json.loads((place / "run/eval.json").read_text())
    assert [*found["baselines"]][-2:] == ["sft_best_of_4", "dpo_best_and_worst"]
    assert "DPO on best and worst of 4" in (place / "run/report.html").read_text()


@pytest.mark.parametrize("where", [finetune, preferences], ids=["best of 4", "DPO"])
def test_a_stop_in_either_baseline_changes_nothing_and_the_samples_are_drawn_once(
    place: Path, where: object, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of_sampling(monkeypatch)
    assert detoxrl([*WORDS, "--run-dir", "whole"]) == 0
    with monkeypatch.context() as stop:
        stop.setattr(
            where, "batch_indices", lambda *given: signal.raise_signal(signal.SIGTERM) or batch_indices(*given)
        )
        assert detoxrl([*WORDS, "--run-dir", "broken"]) == 143
    assert (place / "broken/checkpoints/sft/samples.json").is_file()
    assert (place / "broken/expert").is_dir() == (where is preferences)
    assert not (place / "broken/dpo").exists()

    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 0
    assert len(calls) == 2
    same_end(place / "whole", place / "broken")
    assert (place / "whole/dpo").is_dir()


def test_it_is_left_out_in_one_line_where_all_samples_have_the_same_score(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "flat.py").write_text("def flat(prompts, responses):\n    return [0.5 for _ in responses]\n")
    prepared("--reward.function", "flat.py:flat")
    capfd.readouterr()
    assert detoxrl(SFT) == 0
    shown = capfd.readouterr().err
    assert shown.count("sft: no DPO baseline: each prompt's 4 samples are alike in text or score") == 1
    assert (place / "run/expert").is_dir()
    assert not (place / "run/dpo").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", []),
        ("bart", ["--policy.train-encoder", "--rl.microbatch-size", "2", "--policy.checkpointing"]),
        ("llama", ["--sft.steps", "2", "--sft.full-weights", "--policy.full-weights"]),
        ("t5", ["--sft.steps", "2", "--sft.no-full-weights", "--policy.bf16", "--generation.batch-size", "2"]),
    ],
)
def test_it_is_made_on_every_architecture_and_from_every_start(
    place: Path, bases: dict[str, Path], name: str, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    prepared("--policy.base", str(bases[name]), "--policy.lora-targets", *TARGETS[name],
             "--data.max-prompt-tokens", "100", *words)  # fmt: skip
    assert detoxrl(SFT) == 0
    assert any((place / "run/dpo").glob("*.safetensors"))
    assert not (place / "run/checkpoints/sft").exists()
    capfd.readouterr()


def test_training_the_stage_again_makes_it_again(place: Path) -> None:
    prepared()
    assert detoxrl(SFT) == 0
    first = (place / "run/dpo/adapter_model.safetensors").read_bytes()
    (place / "run/dpo/adapter_model.safetensors").write_bytes(b"another")
    assert detoxrl(SFT) == 0
    assert (place / "run/dpo/adapter_model.safetensors").read_bytes() == first
