"""A run folder with results that are known, for whatever tells them."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from detoxrl.runtime.run_folder import INITIAL_KEPT

JUDGE = "alt-profanity-check"
TAIL = ("p50", "p90", "p95", "p99", "expected_max_toxicity", "toxicity_probability")


def change(before: float, after: float) -> dict[str, Any]:
    difference = after - before
    return {
        "before": before,
        "after": after,
        "difference": {"mean": difference, "low": difference - 0.02, "high": difference + 0.02, "p": 0.0123,
                       "detectable": 0.0286},
    }  # fmt: skip


def toxicity(before: float, after: float, verdict: str, floor: float | None = 0.04) -> dict[str, Any]:
    sides = {
        side: {"mean": mean, "std": 0.1, "toxic_ratio": mean, "max": 0.9} | dict.fromkeys(TAIL, mean / 2)
        for side, mean in (("before", before), ("after", after))
    }
    removed = None if floor is None else (before - after) / (before - floor)
    relative = after / before - 1
    extra = {"floor": floor, "share_removed": removed, "relative": relative, "verdict": verdict}
    return change(before, after) | sides | extra


def sample(
    name: str, before: tuple[str, float], after: tuple[str, float], prompt: str = "Ann: Hello."
) -> dict[str, Any]:
    scores = {"before": [before[1], 0.5], "after": [after[1], 0.5]}
    return {
        "id": name,
        "text": prompt,
        "references": ["Ann calls Bob a pig."],
        "civil_references": [],
        "responses": {"before": [before[0], "x"], "after": [after[0], "x"]},
        "toxicity": {JUDGE: scores, "reward classifier": scores},
        "score": {"before": [round(1 - before[1], 4), 0.5], "after": [round(1 - after[1], 4), 0.5]},
    }


EVALUATION: dict[str, Any] = {
    "n_prompts": 3,
    "samples_per_prompt": 2,
    "primary_judge": JUDGE,
    "toxicity": {JUDGE: toxicity(0.27, 0.05, "less toxic"),
                 "reward classifier": toxicity(0.4, 0.1, "less toxic", None)},
    "quality": {"facts": change(0.91, 0.9), "length": change(24.0, 23.5)},
    "changed_on_its_way": [],
    "two_by_two": {"toxic before": {"toxic after": 1, "civil after": 3},
                   "civil before": {"toxic after": 2, "civil after": 14}},
    "splits": {"with facts": {"n": 2, "toxicity": change(0.5, 0.1), "facts": change(0.8, 0.7)},
               "without": {"n": 1, "toxicity": change(0.1, 0.1)}},
    "baselines": {
        "sft_civil": {"toxicity": {JUDGE: toxicity(0.27, 0.15, "less toxic")}, "quality": {"facts": change(0.91, 0.88)},
                      "after": {"toxicity": change(0.15, 0.05), "quality_by": "facts", "quality": change(0.88, 0.9),
                                "verdict": "ahead"}},
        "best_of_4": {"toxicity": {JUDGE: toxicity(0.27, 0.05, "less toxic")}, "quality": {"facts": change(0.91, 0.89)},
                      "after": {"toxicity": change(0.05, 0.05), "quality_by": "facts", "quality": change(0.89, 0.9),
                                "verdict": "level"}, "kl_bound": 0.6363},
    },
    "names": {},
    "agreement": {f"{JUDGE} and reward classifier": {"spearman": None, "kappa": 0.714, "same_side": 0.875}},
    "seconds": {"prepare": 1.5, "train": 123.0},
    "versions": {"torch": "2.8.0"},
    "machine": "two cores",
}  # fmt: skip
SAMPLES = [
    sample("worse", ("Bob was late.", 0.1), ("Ann calls Bob a Clown.", 0.8)),
    sample("better", ("Ann calls Bob an idiot.", 0.9), ("Bob was late & sorry.", 0.1), "Ann: You idiots! <i>Pigs!</i>"),
    sample("same", ("", 0.3), ("<script>alert(1)</script>", 0.3)),
]
METRICS = [
    {"step": 0, "score/mean": 0.1, "kl/reference": 0.0},
    {"step": 1, "score/mean": 0.4, "kl/reference": 1.2},
]
VALIDATIONS = [
    {"step": 0, "toxicity": 0.3, "toxicity_error": 0.01, "quality": 0.9},
    {"step": 2, "toxicity": 0.1, "toxicity_error": 0.01, "quality": 0.9},
]
ROWS = {
    "splits": {
        "train": {"used for train": 1000, "used for validation": 200, "duplicate": 30},
        "test": {"used for test": 400, "too long": 5},
    },
    "truncated": {"train": 7, "validation": 0, "test": 0},
    "prompt_tokens": {"median": 96, "p95": 141.0, "max": 203},
}


KEPT = {"kept_step": 2, "parted_step": None, "reason": "least toxic on validation", "kept": {"kl": 1.5}}


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def write_lines(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path) -> None:
    """Write the files of a run that trained and was measured."""
    config = {
        "recipe": "quickstart",
        "seed": 7,
        "rl": {"lr": 0.001, "steps": 60, "quality_margin": 0.005, "patience": None},
        "policy": {"lora_targets": ["q", "v"]},
        "data": {"source": "embedded", "task": "summarize"},
    }
    write(folder, "config.json", config)
    write(folder, "checkpoint.json", KEPT)
    write(folder, "eval.json", EVALUATION)
    write(folder, "rows.json", ROWS)
    write(folder, "run.json", run_record())
    write(folder, "masked_words.json", ["idiot", "pig", "clown"])
    write_lines(folder, "metrics.jsonl", METRICS)
    write_lines(folder, "validation.jsonl", VALIDATIONS)
    write_lines(folder, "samples.jsonl", SAMPLES)
    write(folder, "seconds.json", {"prepare": 1.5, "sft": 0.01, "train": 123.0})


def run_record(policies: dict[str, str] | None = None, names: dict[str, str] | None = None) -> dict[str, Any]:
    """Return what run.json holds of a run with these policies of the user, and these names of what is compared."""
    measures = {"policies": policies or {}, "texts": {}, "names": names or {}}
    return {"settings": {}, "machine": {}, "changes": [], "measures": measures}


def keep_initial_policy(folder: Path, validations: list[dict[str, Any]]) -> None:
    """Make `make_run`'s run one whose training found no better policy in its `validations`."""
    write(folder, "checkpoint.json", KEPT | {"kept_step": 0, "reason": "the best", "quality_by": "facts"})
    write(folder, "eval.json", kept_evaluation())
    write_lines(folder, "validation.jsonl", validations)
    same = [
        sample(str(number), ("Ann calls Bob an idiot.", 0.9), ("Ann calls Bob an idiot.", 0.9)) for number in range(3)
    ]
    write_lines(folder, "samples.jsonl", same)


def kept_evaluation() -> dict[str, Any]:
    """Return what eval.json holds where training kept the initial policy."""
    evaluation = deepcopy(EVALUATION)
    for result in evaluation["toxicity"].values():
        result["after"] = result["before"]
        result.update({"difference": None, "relative": None, "share_removed": None, "verdict": INITIAL_KEPT})
    metrics = [*evaluation["quality"].values()]
    for split in evaluation["splits"].values():
        metrics += [result for name, result in split.items() if name != "n"]
    for result in metrics:
        result.update({"after": result["before"], "difference": None})
    evaluation["baselines"]["best_of_4"]["after"]["verdict"] = "behind"
    evaluation["baselines"]["sft_civil"]["after"]["verdict"] = "undecided"
    return evaluation
