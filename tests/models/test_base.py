"""One base in memory serves one policy after another, and none leaves a trace on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import Make, disturb, policy_config
from detoxrl.models import base as base_module
from detoxrl.models.base import Base
from detoxrl.models.loading import load_base
from detoxrl.models.policy import Policy


def logprobs(policy: Policy) -> torch.Tensor:
    ids = torch.full((1, 6), 40)
    with torch.no_grad():
        scored, _, _ = policy.logprobs(policy.encode(["You lost my novel."], None), ids, 1.0, None)
    return scored


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were loaded."""
    sources: list[str] = []

    def counting(source: str, *others: object, **named: object) -> object:
        sources.append(source)
        return load_base(source, *others, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(base_module, "load_base", counting)
    return sources


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_policies_after_one_another_start_from_the_same_base(
    bases: dict[str, Path], starts: dict[tuple[str, str], Path], loads: list[str], name: str
) -> None:
    base = Base.load(str(bases[name]))
    trainable = {path for path, weight in base.model().named_parameters() if weight.requires_grad}
    expected = logprobs(base.frozen_policy())
    for kind in ("fresh", "loaded", "full"):
        policy = base.policy(starts.get((name, kind)), policy_config(name, full=kind == "full"), seed=0)
        disturb(policy)
        assert torch.equal(logprobs(base.frozen_policy()), expected), kind

    assert {path for path, weight in base.model().named_parameters() if weight.requires_grad} == trainable
    assert loads == [str(bases[name])]


def test_an_adapter_that_changes_the_base_has_it_loaded_again(
    bases: dict[str, Path], tmp_path: Path, loads: list[str]
) -> None:
    model, _ = load_base(str(bases["t5"]))
    settings = LoraConfig(
        r=4,
        target_modules=r".*decoder.*\b(q|v)",
        modules_to_save=["final_layer_norm"],
        task_type="SEQ_2_SEQ_LM",
    )
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "modules_to_save" in name:
                weight.add_(0.1)
    adapted.save_pretrained(str(tmp_path))

    base = Base.load(str(bases["t5"]))
    expected = logprobs(base.frozen_policy())
    base.policy(tmp_path, policy_config("t5"), seed=0)
    assert torch.equal(logprobs(base.frozen_policy()), expected)
    assert loads == [str(bases["t5"])] * 2


def test_a_policy_that_cannot_be_made_leaves_nothing_on_the_base(
    bases: dict[str, Path], make_policy: Make, tmp_path: Path
) -> None:
    base = Base.load(str(bases["t5"]))
    expected = logprobs(base.frozen_policy())
    make_policy("bart", "fresh").save(tmp_path)
    with pytest.raises(Exception, match=r"adapter"):
        base.policy(tmp_path, policy_config("t5"), seed=0)
    assert torch.equal(logprobs(base.frozen_policy()), expected)
