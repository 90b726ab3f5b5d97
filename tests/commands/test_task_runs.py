"""Whole runs of every task through the command line, on files and on a hub."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http
from transformers import AutoTokenizer

from chat_templates import GEMMA3, LLAMA3, QWEN25, SMOLLM2
from detoxrl.commands import prepare
from detoxrl.config.edit import config_to_json
from detoxrl.config.recipes import recipe
from detoxrl.models.policy import Policy
from hub import hub, use_hub
from small_runs import SMALL, detoxrl
from stand_in import (
    stand_in,
    stand_in_chat,
    stand_in_encoder,
    stand_in_paradetox,
    stand_in_toxicity_prompts,
)
from test_data import dialogue

TINY = [*SMALL, "--rl.steps", "1", "--evaluation.best-of", "none"]
COLUMNS_REWARD = """
def score(prompts, responses, text, weight, *, references, missing=None, **others):
    assert missing is None and set(others) >= {"id", "messages", "toxicity"}
    assert len(text) == len(weight) == len(references) == len(prompts)
    return [float(w) - len(response) / 100 for w, response in zip(weight, responses)]

def wrong(prompts, responses, mood):
    return [0.0 for _ in responses]
"""


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_talks(path: Path) -> None:
    """Write conversations with a column of their own, in the form that data sets on a hub have."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(40):
            messages = [{"role": "user", "content": f"{dialogue(i)} You idiot!"}]
            if i % 2:
                messages += [{"role": "assistant", "content": "Why?"}, {"role": "user", "content": f"Because {i}."}]
            file.write(json.dumps({"messages": messages, "weight": i}) + "\n")


@pytest.mark.parametrize("family", [LLAMA3, GEMMA3, SMOLLM2])
def test_ones_own_conversations_become_a_report(
    family: Any, bases: dict[str, Path], reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    stand_in_chat(tmp_path / "model", bases["gpt2"], family)
    write_talks(tmp_path / "talk.jsonl")
    (tmp_path / "mine.py").write_text(COLUMNS_REWARD)
    words = ["run", "own", "--data.task", "chat", "--data.source", "talk.jsonl", "--policy.base", "model", *TINY]
    assert detoxrl([*words, "--reward.function", "mine.py:score", "--data.system-prompt", "Be brief."]) == 0

    run = tmp_path / "runs/own"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    account = json.loads((run / "rows.json").read_text())
    first = lines_of(run / "data/train.jsonl")[0]
    assert account["in_chat"]
    assert account["first_prompt"] == tokenizer.decode(tokenizer(first["prompt"], add_special_tokens=False).input_ids)
    shown = capsys.readouterr()
    assert "first prompt, as the model reads it (the chat template; toxic words masked):" in shown.err
    assert "i****" in shown.err
    assert "idiot" not in shown.err + shown.out

    samples = lines_of(run / "samples.jsonl")
    assert all(set(sample["columns"]) == {"messages", "weight"} for sample in samples)
    evaluation = json.loads((run / "eval.json").read_text())
    assert evaluation["task"] == "chat"
    assert evaluation["quality_by"] == "distinct_2"
    assert {"nll", "entropy", "distinct_3", "refusal_rate", "copied"} <= set(evaluation["quality"])
    page = (run / "report.html").read_text()
    assert "The first prompt, as the model reads it (with the chat template)" in page
    with (run / "samples.csv").open(encoding="utf-8-sig", newline="") as sheet:
        assert next(csv.reader(sheet))[:3] == ["id", "conversation", "reply"]
    (metrics,) = lines_of(run / "metrics.jsonl")
    assert abs(metrics["kl/reference"]) < 1e-3
    assert metrics["ratio/first_error"] < 1e-3

    assert detoxrl(["export", "runs/own"]) == 0
    card = (tmp_path / "runs/own-export/README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "apply_chat_template(messages" in card
    assert "- In the audit of group mentions, civil mentions of a group are rated less favourably than neutral" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "runs/own-export")
    exec(compile(code, "card", "exec"), {})


def test_a_column_that_the_reward_asks_for_and_the_rows_lack_is_one_line(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_talks(tmp_path / "talk.jsonl")
    copytree(bases["gpt2"], tmp_path / "model")
    (tmp_path / "mine.py").write_text(COLUMNS_REWARD)
    words = ["run", "own", "--data.task", "chat", "--data.source", "talk.jsonl", "--policy.base", "model", *TINY]
    words += ["--data.max-prompt-tokens", "200"]
    assert detoxrl([*words, "--reward.function", "mine.py:wrong"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "mine.py:wrong': asks for mood, and the rows have no such column; choose from id, text" in line
    assert not (tmp_path / "runs").exists()


def test_a_source_is_rewritten_between_a_floor_and_a_ceiling(
    bases: dict[str, Path], reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stand_in_paradetox(tmp_path / "pairs", 60)
    copytree(bases["t5"], tmp_path / "model")
    copytree(reward_folder, tmp_path / "classifier")
    words = ["run", "own", "--data.task", "rewrite", "--data.source", "pairs", "--policy.base", "model",
             "--data.text-column", "en_toxic_comment", "--data.reference-column", "en_neutral_comment",
             "--reward.classifier", "classifier", "--evaluation.fluency", "classifier=nothate", *TINY]  # fmt: skip
    assert detoxrl(words) == 0
    run = tmp_path / "runs/own"
    account = json.loads((run / "rows.json").read_text())["splits"]["train"]
    assert account["further reference of a row"] == 20
    evaluation = json.loads((run / "eval.json").read_text())
    assert {"copy", "human", "word_filter"} <= set(evaluation["baselines"])
    copy = evaluation["baselines"]["copy"]["quality"]
    assert copy["source_similarity"]["after"] == pytest.approx(1.0)
    assert evaluation["baselines"]["human"]["quality"]["rouge_l"]["after"] == pytest.approx(1.0)
    scale = evaluation["joint_scale"]
    if scale is not None:
        human = evaluation["baselines"]["human"]["quality"]["joint"]["after"]
        assert scale["human"] == pytest.approx(human)
        span = scale["human"] - scale["copy"]
        assert scale["before"] == pytest.approx((evaluation["quality"]["joint"]["before"] - scale["copy"]) / span)
    page = (run / "report.html").read_text()
    assert "Copy of the source" in page
    assert "Rewritten by people" in page


def test_a_chat_model_of_another_kind_is_measured_in_its_own_template(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stand_in_chat(tmp_path / "llama", bases["gpt2"], LLAMA3)
    stand_in_chat(tmp_path / "gemma", bases["gpt2"], GEMMA3)
    copytree(bases["llama"], tmp_path / "plain")
    write_talks(tmp_path / "talk.jsonl")
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [0.0 for _ in responses]\n")
    read: list[str] = []
    encode = Policy.encode

    def spy(policy: Policy, prompts: Any, *others: Any) -> Any:
        encoded = encode(policy, prompts, *others)
        read.extend(policy.tokenizer.decode(ids) for ids in encoded.states)
        return encoded

    monkeypatch.setattr(Policy, "encode", spy)
    words = ["evaluate", "own", "--data.task", "chat", "--data.source", "talk.jsonl", "--policy.base", "llama",
             "--policy", "gemma=gemma", "--policy", "plain=plain", "--reward.function", "mine.py:score",
             "--data.max-prompt-tokens", "200", *TINY]  # fmt: skip
    assert detoxrl(words) == 0
    assert any("<bos><start_of_turn> user" in text or "<bos><start_of_turn>user" in text for text in read)
    assert any("<|start_header_id|>" in text for text in read)
    assert any("Assistant:" in text and "<|" not in text for text in read)


# The recipes that need a hub


@pytest.fixture
def recipes_hub(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub on loopback with everything that the recipes name, in use; yields a folder to work in."""
    folder = tmp_path / "repositories"
    served = stand_in(folder, rows=40)
    tokenizer = AutoTokenizer.from_pretrained(served["google/flan-t5-small"])
    chat = bases["gpt2"]
    served["HuggingFaceTB/SmolLM2-135M-Instruct"] = stand_in_chat(folder / "smol", chat, SMOLLM2)
    served["HuggingFaceTB/SmolLM2-135M"] = stand_in_chat(folder / "smol-base", chat, SMOLLM2)
    served["Qwen/Qwen2.5-0.5B-Instruct"] = stand_in_chat(folder / "qwen", chat, QWEN25)
    served["textattack/roberta-base-CoLA"] = served["s-nlp/roberta_toxicity_classifier"]
    served["sentence-transformers/all-MiniLM-L6-v2"] = stand_in_encoder(folder / "minilm", tokenizer)
    prompts = "datasets/allenai/real-toxicity-prompts"
    served[prompts] = stand_in_toxicity_prompts(folder / "rtp", 120)
    served["datasets/s-nlp/paradetox"] = stand_in_paradetox(folder / "paradetox", 60)

    without_sleep = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", without_sleep)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.chdir(tmp_path)
    with hub(served) as running:
        use_hub(monkeypatch, running.address, tmp_path / "cache")
        yield tmp_path
    _http.close_session()


@pytest.mark.parametrize("name", ["smollm2", "realtoxicity", "paradetox", "dialogsum-chat"])
def test_a_recipe_for_the_hub_runs_to_its_report(name: str, recipes_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the extra `judge` is installed, its encoder is the real one.
    monkeypatch.setitem(prepare._ON_ENCODER, "steps", 2)
    if name == "paradetox":
        pytest.importorskip("sentence_transformers")
    words = [*TINY, "--evaluation.samples-per-prompt", "2", "--data.max-prompt-tokens", "300"]
    if name == "realtoxicity":
        other_judge = "s-nlp/roberta_toxicity_classifier=toxic"
        words += ["--evaluation.best-of", "4", "--evaluation.best-of-samples", "2"]
        words += ["--evaluation.other-judges", other_judge]
    if recipe(name).sft.steps:
        words += ["--sft.steps", "2", "--evaluation.fluency", "textattack/roberta-base-CoLA=toxic"]
    if name == "dialogsum-chat":
        words += ["--data.limit", "30"]
    assert detoxrl(["run", name, *words]) == 0, sys.stderr

    run = recipes_hub / "runs" / name
    evaluation = json.loads((run / "eval.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert evaluation["task"] == config["data"]["task"]
    assert "@" in config["policy"]["base"]
    in_chat = json.loads((run / "rows.json").read_text())["in_chat"]
    assert in_chat == (name in ("smollm2", "dialogsum-chat"))
    if name == "realtoxicity":
        parts = evaluation["by_prompt"]
        assert set(parts) == {"toxic prompts", "other prompts"}
        assert sum(part["n"] for part in parts.values()) == evaluation["n_prompts"]
        judges = [judge for judge in evaluation["toxicity"] if judge != "reward classifier"]
        _, other = judges
        nucleus = evaluation["top_p"]
        assert nucleus["p"] == 0.9
        for part in (*parts.values(), nucleus, *nucleus["by_prompt"].values()):
            of_both = {f"expected_max_toxicity/{other}", f"toxicity_probability/{other}"}
            assert {"expected_max_toxicity", "toxicity_probability", "nll", "distinct_3"} <= set(part["quality"])
            assert of_both <= set(part["quality"])
        assert set(nucleus["by_prompt"]) == set(parts)
        samples = lines_of(run / "samples.jsonl")
        means = [np.mean(sample["toxicity"][judges[0]]["before_top_p"]) for sample in samples]
        assert nucleus["toxicity"][judges[0]]["before"]["mean"] == pytest.approx(np.mean(means), abs=1e-4)
        # Fewer tokens are surer ones.
        assert nucleus["quality"]["entropy"]["before"] < evaluation["quality"]["entropy"]["before"] - 0.05
        assert "before_top_p" not in evaluation["baselines"]
        # Best of 4 is measured as the others are, so its extremes are comparable.
        assert {len(sample["responses"]["best_of_4"]) for sample in samples} == {2}
        assert "expected_max_toxicity" in parts["toxic prompts"]["baselines"]["best_of_4"]["quality"]
        assert "<h2>Sampled with top-p 0.9</h2>" in (run / "report.html").read_text()
        assert "<h2>Toxic prompts, and the others</h2>" in (run / "report.html").read_text()
        assert evaluation["toxicity"][evaluation["primary_judge"]]["before"]["expected_max_toxicity"] > 0
        train = lines_of(run / "data/train.jsonl")
        assert all(row["toxicity"] >= 0.3 for row in train)
    if name == "paradetox":
        assert evaluation["quality"]["joint"]["before"] >= 0
        assert {"copy", "human"} <= set(evaluation["baselines"])


def test_a_reward_that_was_trained_keeps_its_encoder_when_a_run_is_resumed(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETOXRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(prepare._ON_ENCODER, "steps", 2)
    copytree(bases["gpt2"], tmp_path / "model")
    stand_in_encoder(tmp_path / "encoder", AutoTokenizer.from_pretrained(bases["t5"]))
    words = ["own", "--policy.base", "model", "--reward.classifier", "embedded", "--data.limit", "40",
             "--data.max-prompt-tokens", "200", "--data.task", "continue", *TINY]  # fmt: skip
    assert detoxrl(["prepare", *words, "--reward.encoder", "encoder"]) == 0
    settings = json.loads((tmp_path / "runs/own/reward/config.json").read_text())
    assert settings["model_type"] == "bert"
    assert settings["id2label"] == {"0": "nothate", "1": "hate"}

    capsys.readouterr()
    assert detoxrl(["run", *words, "--resume", "--accept-changes", "--reward.encoder", "none"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "reward.encoder = None: differs from the run's" in line
    assert "stage prepare has started with that" in line


def test_a_run_folder_of_an_earlier_version_is_refused_in_one_line(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(config_to_json(recipe("own")))
    (old / "rows.json").write_text('{"splits": {}, "truncated": {}, "summary_tokens": null}')
    for command in (["report", "old"], ["evaluate", "old"], ["run", "--resume", "--run-dir", "old"]):
        assert detoxrl(command) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "was made by an earlier version, whose rows this one cannot read; repeat it: detoxrl run --from" in line


def test_texts_to_measure_know_their_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, word in (("a", "idiot"), ("b", "friend")):
        rows = [{"prompt": f"The {i}", "continuation": "x", "response": f"{word} {i}"} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "own", "--data.task", "continue", "--texts", "a.jsonl", "b.jsonl", "--run-dir", "texts"]
    assert detoxrl(words) == 0
    evaluation = json.loads((tmp_path / "texts/eval.json").read_text())
    assert (evaluation["task"], evaluation["quality_by"]) == ("continue", "distinct_2")
    assert "rouge_l" not in evaluation["quality"]
