"""In which words are the results of a fit told?"""

import shlex
from pathlib import Path
from typing import Any

from detoxrl.report.words import number, percent

METRIC_NAMES = {
    "auc": "AUC",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "recall_at_precision_0.9": "recall at precision 0.9",
    "spearman": "Spearman",
    "mae": "mean absolute error",
    "brier": "Brier score",
    "ece": "calibration error",
}
"""The metrics of a label, as cards and terminals call them."""
KINDS = {
    "scores": "a sigmoid for each label",
    "classes": "a softmax over the labels",
    "pairs": "a scorer of the Bradley-Terry model: one output, a score without a sigmoid",
}
_OWN_DATA = "--data.source my.jsonl"


def with_interval(result: dict[str, Any]) -> str:
    """Return a value with its 95 % interval: "0.931 (0.912 to 0.948)"; a dash if it is not defined."""
    if result["value"] is None:
        return number(None)
    return f"{number(result['value'])} ({number(result['low'])} to {number(result['high'])})"


def headline(result: dict[str, Any]) -> str:
    """Return the main numbers of a fit in one sentence without a full stop."""
    test = result["test"]
    count = result["examples"]["test"]
    if result["kind"] == "pairs":
        accuracy = test["pairs"]["accuracy"]
        share = percent(accuracy["value"])
        interval = f"{percent(accuracy['low'])} to {percent(accuracy['high'])}"
        return f"The chosen text has the higher score in {share} of {count:,} test pairs (95 % interval {interval})"

    of_labels = {label: measured["metrics"] for label, measured in test["labels"].items()}
    accuracy = f"accuracy {with_interval(test['accuracy'])}, " if "accuracy" in test else ""
    if len(of_labels) == 1:
        (metrics,) = of_labels.values()
        f1, error = number(metrics["f1"]["value"]), number(metrics["ece"]["value"])
        sentence = f"AUC {with_interval(metrics['auc'])}, F1 {f1}, calibration error {error}"
    else:
        aucs = {label: metrics["auc"]["value"] for label, metrics in of_labels.items()}
        if result["kind"] == "classes" and len(aucs) == 2:  # Both classes have the same.
            aucs.popitem()
        sentence = f"{accuracy}{_mean_auc(aucs)}"
    return f"{sentence[:1].upper()}{sentence[1:]} on {count:,} test texts"


def _mean_auc(aucs: dict[str, float | None]) -> str:
    """Return the mean AUC of the labels that have one, and those of the worst and the best."""
    defined = {label: value for label, value in aucs.items() if value is not None}
    if not defined:
        return f"AUC {number(None)}"

    mean = number(sum(defined.values()) / len(defined))
    if len(defined) == 1:
        return f"AUC {mean}"
    lowest = min(defined, key=defined.__getitem__)
    highest = max(defined, key=defined.__getitem__)
    spread = f"{number(defined[lowest])} {lowest} to {number(defined[highest])} {highest}"
    return f"mean AUC of {len(defined)} labels {mean} ({spread})"


def left_out_notes(result: dict[str, Any]) -> list[str]:
    """Return what was left out of training and test and why, and what contradicts itself, each in a few words."""
    examples = result["examples"]
    said = [f"{count:,} left out: {reason}" for reason, count in examples["left_out"].items()]

    leaks = sum(examples["leaks"].values())
    if leaks:
        said.append(f"{leaks:,} held-out removed: near-duplicates of other ones")
    if examples["conflicting_texts"]:
        said.append(f"{examples['conflicting_texts']:,} with conflicting labels")
    if examples["in_unused_splits"]:
        said.append(f"{examples['in_unused_splits']:,} in splits that are not used")
    if examples["cut_texts"]:
        said.append(f"{examples['cut_texts']:,} cut at {result['max_length']} tokens")
    return said


def reward_flags(result: dict[str, Any]) -> str:
    """Return the flags by which a run reads the classifier as its reward; LABEL stands where none is known."""
    toxic, good = result["meaning"]["toxic_label"], result["meaning"]["good_label"]
    of_good = f"--reward.good-label {shlex.quote(good or 'none')}"
    if toxic is None and good is not None:
        return f"{of_good} --reward.toxic-label none"
    return f"--reward.toxic-label {shlex.quote(toxic or 'LABEL')} {of_good}"


def known_label(result: dict[str, Any]) -> str | None:
    """Return the label that means toxic text, else the one that means civil text; None where neither is known."""
    label: str | None = result["meaning"]["toxic_label"] or result["meaning"]["good_label"]
    return label


def judged_label(result: dict[str, Any]) -> str | None:
    """Return the label that a judge may ask for: the toxic one, or the first; None where only a good one is known."""
    label: str | None = result["meaning"]["toxic_label"] if known_label(result) else result["labels"][0]
    return label


def ending(target: Path, result: dict[str, Any]) -> list[str]:
    """Return the last three lines of a fit on the screen: what was made, where it is, and what to do next."""
    examples = result["examples"]
    unit = "pairs" if result["kind"] == "pairs" else "texts"
    stopped = result["training"]["steps"] < result["training"]["planned"]
    when = f"stopped early at step {result['training']['steps']}, " if stopped else ""
    first = (
        f"Fitted to {examples['train']:,} {unit} ({when}best of step {result['training']['best_step']}). "
        f"{headline(result)}."
    )

    made = "LoRA adapter" if result["settings"]["lora_rank"] else "Classifier"
    second = f"{made}: {target}; read {target / 'README.md'}"
    said = left_out_notes(result)
    if said:
        second += f". Of the examples: {'; '.join(said)}"

    folder = shlex.quote(str(target))
    run = f"detoxrl run own {_OWN_DATA} --reward.classifier {folder} {reward_flags(result)}"
    label = judged_label(result)
    if label is None:
        return [first, second, f"next: {run}"]
    if known_label(result) is None:
        run = f"with the label that means toxic text in place of LABEL, {run}"
    judge = shlex.quote(f"{target}={label}")
    return [first, second, f'next: detoxrl score "You are an idiot" --judge {judge}; {run}']
