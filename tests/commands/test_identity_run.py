"""The audit of group mentions through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import disturb, policy_config
from detoxrl.commands import responses
from detoxrl.evaluation.identity_sentences import GROUPS
from detoxrl.models.lora import load_policy
from detoxrl.models.sampling import Distribution, Sample
from detoxrl.models.types import Prompt
from detoxrl.runs import Run
from detoxrl.runtime.run_folder import RunFolder
from small_runs import SMALL, detoxrl


def result(root: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(root, "eval.json").read_text())
    return found


def test_policies_are_audited_with_their_judges_and_reward_and_a_stop_changes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy("model", None, policy_config("t5"), seed=0)
    disturb(policy)
    policy.save(place / "theirs")
    words = ["evaluate", "own", "--policy.base", "model", "--reward.classifier", "classifier", "--data.source",
             "mine.jsonl", "--policy", "theirs=theirs", *SMALL, "--evaluation.best-of", "none",
             "--evaluation.no-sharpened", "--evaluation.identity-prompts", "138",
             "--generation.batch-size", "100"]  # fmt: skip
    assert detoxrl([*words, "--run-dir", "whole"]) == 0
    shown = capsys.readouterr().out
    judge = (
        "warning: civil mentions of a group are rated less favourably than neutral words by alt-profanity-check (gay"
    )
    assert judge in shown

    audit = result("whole")["identity"]
    assert set(audit["judges"]) == {"alt-profanity-check", "reward classifier"}
    for rater in (*audit["judges"].values(), audit["reward"]):
        assert list(rater["groups"]) == [group.name for group in GROUPS]
        assert rater["sentences"] == 304
    assert audit["reward"]["std"] > 0
    assert (audit["policy"]["n_prompts"], audit["policy"]["samples_per_prompt"]) == (138, 2)
    measures = audit["policy"]["measures"]
    assert set(measures) == {"toxicity", "refusal_rate", "empty_rate", "length"}
    length = measures["length"]
    assert length["mentions"]["before"] > 1
    assert length["gap"]["before"] == pytest.approx(length["mentions"]["before"] - length["neutral"]["before"])
    assert length["gap"]["difference"]["mean"] == pytest.approx(length["gap"]["after"] - length["gap"]["before"])
    assert length["gap"]["before"] != length["gap"]["after"]

    page = Path("whole/report.html").read_text()
    assert "<h2>Mentions of groups</h2>" in page
    assert "138 generated prompts, 2 samples each." in page

    append = RunFolder.append

    def stop_late(folder: RunFolder, name: str, record: Any) -> None:
        append(folder, name, record)
        if name == responses.RESPONSES and len(folder.read_lines(name)) == 4:  # 2 of held-out prompts, 2 of the audit
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", stop_late)
        assert detoxrl([*words, "--run-dir", "broken"]) == 130
    assert detoxrl(["run", "--resume", "--run-dir", "broken"]) == 0
    assert result("broken")["identity"] == audit

    def echo(source: Distribution, initial: object, prompts: list[Prompt], *others: object) -> list[list[Sample]]:
        return [[Sample(f"{source.adapter} {prompt.text}", None)] for prompt in prompts]

    monkeypatch.setattr(responses, "sample_with_likelihoods", echo)
    found = responses.sampled_responses(Run(*RunFolder.open(Path("whole"))), {"after": "theirs"})
    for policy, adapter in (("before", "None"), ("after", "measured0")):
        assert len(found.identity_texts[policy]) == 138
        for sentence, (text,) in found.identity_texts[policy].items():
            assert f": {sentence}\n" in text
            assert text.startswith(adapter)


def test_texts_have_their_judges_audited_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} says {i}.\n" for i in range(8)))
    assert detoxrl(["evaluate", "--texts", "a.txt", "b.txt", "--run-dir", "texts"]) == 0
    audit = result("texts")["identity"]
    assert audit["reward"] is audit["policy"] is None
    assert audit["judges"]["alt-profanity-check"]["worst"] == "gay"
    page = (tmp_path / "texts/report.html").read_text()
    assert "rated more toxic than their neutral match: gay (+0.311), transgender" in page
    assert "were not sampled" not in page
