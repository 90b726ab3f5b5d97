"""Do the benchmarks on real data keep their numbers, and nothing but numbers?"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kept_results
import realtoxicity
import tables
from detoxrl.commands.sweep_plan import SweepPlan
from encoders import make_encoder
from kept_results import KEPT

WORDS = ["lamp", "parcel", "soup", "garden", "ticket", "kettle", "letter", "window", "carpet", "pillow", "candle"]
BRIEF = {
    "rl.steps": 1, "rl.batch_size": 8, "rl.minibatch_size": 4, "rl.validation_prompts": 4, "rl.validate_every": 1,
    "reward.normalise_on": 8, "evaluation.prompts": 6, "evaluation.samples_per_prompt": 2, "evaluation.bootstrap": 50,
    "evaluation.primary_judge": "alt-profanity-check", "evaluation.other_judges": [], "generation.max_new_tokens": 6,
    "policy.lora_targets": ["c_attn"], "data.max_prompt_tokens": 100,
}  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def texts_in(value: object) -> Iterator[str]:
    """Yield every text within a value of JSON."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
    elif isinstance(value, str):
        yield value


def test_runs_and_sweep_are_kept_as_numbers_and_plots(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=12)) for _ in range(150)]
    prompts = [
        {"prompt": {"text": text, "toxicity": row % 2 * 0.8}, "continuation": {"text": "a lamp", "toxicity": 0.1}}
        for row, text in enumerate(texts[:80])
    ]
    pairs = [{"en_neutral_comment": f"fine {text}", "en_toxic_comment": f"stupid {text}"} for text in texts]
    write_rows(tmp_path / "prompts.jsonl.gz", prompts)
    write_rows(tmp_path / "pairs.jsonl.gz", pairs)

    encoder = str(make_encoder("bert", tmp_path / "encoder"))
    monkeypatch.setattr(realtoxicity, "SCORER", {**realtoxicity.SCORER, "encoder": encoder})
    monkeypatch.setattr(realtoxicity, "PLACE", tmp_path / "results")
    monkeypatch.setattr(realtoxicity, "SWEEP", SweepPlan(over=("rl.kl-coef=0.02,0.1",)))
    for name in ("BASELINES", "NO_BASELINES", "BRIEFLY"):
        brief = {**getattr(realtoxicity, name), **BRIEF}
        if brief["sft.baseline_steps"]:
            brief["sft.baseline_steps"] = 1
        monkeypatch.setattr(realtoxicity, name, brief)
    words = ["realtoxicity.py", "prompts.jsonl.gz", "pairs.jsonl.gz", str(bases["gpt2"]), "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", words)
    realtoxicity.main()

    results = tmp_path / "results"
    found = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    of_runs = {f"seed{seed}/{name}" for seed in (0, 1) for name in (*KEPT, "validations.svg")}
    assert found == of_runs | {"sweep/sweep.json", "sweep/frontier.svg"}

    kept = json.loads((results / "seed0/eval.json").read_text())
    assert "changed_on_its_way" not in kept  # Its settings may be paths.
    baselines = kept["baselines"]
    assert {"word_filter", "best_of_4", "sft_best_of_4"} <= set(baselines)
    assert set(json.loads((results / "seed1/eval.json").read_text())["baselines"]) == {"word_filter"}
    for path in results.rglob("*.json*"):
        values = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else [
            json.loads(path.read_text())
        ]  # fmt: skip
        for text in texts_in(values):
            assert len(text) < 60
            assert not any(word in text for word in WORDS)
            assert str(tmp_path) not in text

    monkeypatch.setattr(tables, "EXTREMES", tables.EXTREMES[:2])  # There is one judge here.
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "realtoxicity").symlink_to(results)
    found = tables.tables()
    head, _, *lines = found["realtoxicity, toxic prompts"].splitlines()
    assert head == "|  | seed 0 | seed 1 |"
    assert found["realtoxicity, toxic prompts, top-p"].splitlines()[0] == "|  | seed 0 |"
    part = json.loads((results / "seed1/eval.json").read_text())["by_prompt"]["toxic prompts"]["quality"]
    assert f"{part['expected_max_toxicity']['before']:.3f}" in lines[0].split(" | ")[2]
    places = "".join(f"<!-- table: {name} -->\nold\n<!-- end of table -->\n" for name in found)
    written = tables.with_tables(f"# Page\n{places}End.\n", found)
    assert all(table in written for table in found.values())
    assert "old" not in written
    assert tables.with_tables(written, found) == written
    assert written.endswith("<!-- end of table -->\nEnd.\n")

    # What is finished is not made again.
    made = (tmp_path / "runs/realtoxicity/seed0/eval.json").stat().st_mtime_ns
    realtoxicity.main()
    assert (tmp_path / "runs/realtoxicity/seed0/eval.json").stat().st_mtime_ns == made


def test_a_fit_is_made_once_and_finished_if_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(kept_results, "resume_fit", lambda folder: calls.append(f"resume {folder.name}"))
    monkeypatch.setattr("detoxrl.fit", lambda source, folder, settings: calls.append(f"fit {folder.name} to {source}"))
    (tmp_path / "there").mkdir()
    (tmp_path / "stopped.unfinished").mkdir()
    (tmp_path / "stopped.unfinished/settings.json").write_text("{}")
    for name in ("there", "stopped", "new"):
        assert kept_results.fitted("pairs.jsonl", tmp_path / name, {}) == tmp_path / name
    assert calls == ["resume stopped", "fit new to pairs.jsonl"]
