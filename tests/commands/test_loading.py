"""Base, reward and judges are loaded once in a whole run, and from where they should be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from conftest import policy_config, small_config
from detoxrl.evaluation.policies import MeasuredPolicies
from detoxrl.models.base import Base
from detoxrl.runs import Run
from detoxrl.runtime.run_folder import RunFolder
from small_runs import contents, detoxrl, own

WARM_START = ["--sft.steps", "2", "--sft.batch-size", "4", "--sft.baseline-steps", "2"]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model was loaded from each folder, by the folder's name."""
    counts: Counter[str] = Counter()
    from_pretrained = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def counting(cls: type[PreTrainedModel], folder: Any, *others: Any, **settings: Any) -> Any:
        counts[Path(folder).name] += 1
        return from_pretrained(cls, folder, *others, **settings)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting))
    return counts


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"model": 1}),
        ([*WARM_START, "--sft.no-full-weights"], {"model": 1}),
        (WARM_START, {"model": 1, "base": 1}),  # The warm start makes another base.
        (["--policy.full-weights"], {"model": 1, "adapter": 1}),  # The trained model is read to be measured.
    ],
    ids=["lora", "warm start by lora", "warm start of all weights", "full weights"],
)
def test_base_reward_and_judge_are_loaded_once(
    place: Path, loaded: Counter[str], words: list[str], expected: dict[str, int]
) -> None:
    copytree("classifier", "judge")
    judge = ["--evaluation.primary-judge", "judge", "--evaluation.judge-label", "hate"]
    assert detoxrl(own(*judge, *words, "--run-dir", "run")) == 0
    assert loaded == {"classifier": 1, "judge": 1, **expected}


def test_a_run_that_is_overwritten_does_not_lend_its_base_to_the_check_of_the_new_one(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert detoxrl(own(*WARM_START, "--run-dir", "run")) == 0
    before = contents(place / "run")

    copytree("model", "headless")
    weights = load_file("headless/model.safetensors")
    del weights["decoder.final_layer_norm.weight"]
    save_file(weights, "headless/model.safetensors", metadata={"format": "pt"})
    assert detoxrl(own("--policy.base", "headless", *WARM_START, "--run-dir", "run", "--overwrite")) == 2
    assert "lacks weights of a generator" in capfd.readouterr().err
    assert contents(place / "run") == before

    words = own(*WARM_START, "--sft.no-full-weights", "--run-dir", "run", "--overwrite")
    assert detoxrl(words) == 0  # The old run has no start/, which the new one is to make.
    assert (place / "run/start").is_dir()
    assert not (place / "run/base").exists()
    assert detoxrl(["doctor", *words[1:-3], "--run-dir", "run"]) == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_policies_that_are_compared_have_one_precision(
    bases: dict[str, Path], starts: dict[tuple[str, str], Path], bf16: bool
) -> None:
    config = replace(small_config(), policy=replace(policy_config("t5"), base=str(bases["t5"]), bf16=bf16))

    def load(in_bf16: bool) -> Base:
        return Base.load(str(bases["t5"]), bf16=in_bf16)

    whole = MeasuredPolicies(load, None, {}, {"after": str(bases["t5"])}, config)
    assert {whole.get(name)[0].model.dtype for name in whole.names} == {torch.float32}
    lora = MeasuredPolicies(load, None, {}, {"after": str(starts["t5", "loaded"])}, config)
    expected = torch.bfloat16 if bf16 else torch.float32
    assert {lora.get(name)[0].weights.active.dtype for name in lora.names} == {expected}


def test_a_base_is_kept_until_another_precision_is_asked_for(bases: dict[str, Path], tmp_path: Path) -> None:
    config = replace(small_config(), policy=replace(policy_config("t5"), base=str(bases["t5"])))
    run = Run(RunFolder(tmp_path), config)

    kept = run.base(bf16=True)
    assert kept.model().dtype == torch.bfloat16
    assert run.base(bf16=True) is kept
    assert run.base(bf16=False).model().dtype == torch.float32
