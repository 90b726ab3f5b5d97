"""Are the models that come with the package what their recipe makes?

    make models                                           trains them again and compares; 3 to 13 minutes on 2 cores
    python benchmarks/models/shipped_models.py --write    also replaces those in the package

The quickstart of seed 0 starts from a warm start and a reward model that come with the package. This trains both again
from the same rows and settings, and measures them beside the shipped ones on rows and utterances that neither has seen.
Weights are equal to the last bit only on the same kind of processor with the same libraries, so behaviour is compared:
the command ends with 1 if a measurement differs by more than its bound, or if the shipped models were made from other
settings or rows than the quickstart has now.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from safetensors.torch import load_file
from scipy.stats import mannwhitneyu

from detoxrl.commands import run as stages
from detoxrl.commands.prepare import reward_ingredients, train_embedded_reward
from detoxrl.config.recipes import recipe
from detoxrl.data.embedded.corpus import generate_utterances
from detoxrl.data.embedded.facts import facts_kept
from detoxrl.data.rows import to_prompts
from detoxrl.evaluation.judges import profanity_judge
from detoxrl.models.base import Base
from detoxrl.models.sampling import Draws, sample_all
from detoxrl.rewards.classifier import load_classifier
from detoxrl.runs import Run
from detoxrl.runtime.files import replace_folder
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.runtime.shipped import MODELS, ingredients_digest, manifest, pack
from detoxrl.training.finetune import examples, pad_batch
from detoxrl.training.sft import warm_start, warm_start_ingredients

SEED = 0
NAMES = ("base", "reward")
UNSEEN_SEED = 1_000_003  # Of the utterances that the reward model is measured on.
UNSEEN_UTTERANCES = 2_000
SAMPLES = 2
# How far a measurement may differ between two trainings. The toxicity has a standard error of 0.01 on these prompts.
BOUNDS = {
    "held-out loss, nats a token": 0.02,
    "facts kept": 0.02,
    "toxicity, alt-profanity-check": 0.04,
    "reward accuracy": 0.005,
    "reward AUC": 0.005,
}

Measurements = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the models in the package")
    parser.add_argument("--folder", type=Path, default=Path("runs/models"), help="where to train (default runs/models)")
    arguments = parser.parse_args()

    run = prepared_run(arguments.folder)
    rebuilt = arguments.folder / "rebuilt"
    rebuild(run, rebuilt)
    ingredients = {"base": warm_start_ingredients(run), "reward": reward_ingredients(SEED)}

    new = measurements(run, rebuilt)
    if arguments.write:
        write(rebuilt, ingredients, new)
    sys.exit(0 if agrees(run, rebuilt, ingredients, new) else 1)


def prepared_run(root: Path) -> Run:
    """Return a run of the quickstart whose folder holds the rows and the tokenizer."""
    config = recipe("quickstart", {"seed": SEED})
    stages.prepare(root, config, "overwrite")
    return Run(RunFolder(root), config)


def rebuild(run: Run, folder: Path) -> None:
    """Train both models into `folder`, whatever the package and the cache hold."""
    train_embedded_reward(SEED, None, run.folder / "checkpoints/prepare", folder / "reward")
    with replace_folder(folder / "base") as base:
        warm_start(run, base, run.folder / "checkpoints/sft/base")


def measurements(run: Run, folder: Path) -> Measurements:
    """Return what the models in `folder` do on the validation rows, and on utterances of another seed."""
    return {**_base_measurements(run, folder / "base"), **_reward_measurements(folder / "reward")}


def _base_measurements(run: Run, folder: Path) -> Measurements:
    base = Base.load(str(folder))
    rows = run.rows("validation")
    model = base.model()
    inputs, labels = examples(base.tokenizer, [(row.prompt, row.references[0]) for row in rows], True)
    with torch.no_grad():
        loss = model(**pad_batch(base.tokenizer.pad_token_id, inputs, labels, model.device)).loss

    draws = Draws(SEED, "shipped models")
    drawn = sample_all(base.frozen_policy(), to_prompts(rows), run.config.generation, draws, None)
    texts = [[response.text for response in responses] for responses in drawn]
    kept = [
        facts_kept(text, row.facts) for row, samples in zip(rows, texts, strict=True) for text in samples if row.facts
    ]
    judge = profanity_judge()
    assert judge is not None
    return {
        "held-out loss, nats a token": float(loss),
        "facts kept": float(np.mean(kept)),
        "toxicity, alt-profanity-check": float(judge([text for samples in texts for text in samples]).mean()),
    }


def _reward_measurements(folder: Path) -> Measurements:
    utterances = generate_utterances(UNSEEN_SEED, UNSEEN_UTTERANCES)
    texts = [text for text, _ in utterances]
    hateful = np.array([is_hateful for _, is_hateful in utterances])

    toxic, good = {"reward.toxic_label": "hate"}, {"reward.good_label": "nothate"}
    classifier = load_classifier(str(folder), "reward.classifier", toxic, torch.device("cpu"), good)
    toxicity = classifier.toxicity(texts).numpy()
    pairs_won = mannwhitneyu(toxicity[hateful], toxicity[~hateful]).statistic
    return {
        "reward accuracy": float(np.mean((toxicity >= 0.5) == hateful)),
        "reward AUC": float(pairs_won / (hateful.sum() * (~hateful).sum())),
    }


def write(folder: Path, ingredients: Mapping[str, list[str]], measured: Measurements) -> None:
    """Replace the models in the package."""
    made: dict[str, Any] = {
        "by": "make models",
        "on": datetime.now(UTC).date().isoformat(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    for name in NAMES:
        ours = {
            key: round(value, 4) for key, value in measured.items() if key.startswith("reward") == (name == "reward")
        }
        pack(folder / name, name, ingredients[name], {**made, "measured": ours})


def agrees(run: Run, rebuilt: Path, ingredients: Mapping[str, list[str]], new: Measurements) -> bool:
    """Print the rebuilt models beside the shipped ones, and return whether they agree."""
    shipped = measurements(run, MODELS)
    table = Table("", "shipped", "rebuilt", Column("bound", justify="right"), "")
    verdicts = []
    for name, bound in BOUNDS.items():
        fits = abs(new[name] - shipped[name]) <= bound
        verdicts.append(fits)
        table.add_row(name, f"{shipped[name]:.4f}", f"{new[name]:.4f}", f"{bound:g}", "" if fits else "differs")

    for name in NAMES:
        current = ingredients_digest(ingredients[name]) == manifest()[name]["ingredients"]
        verdicts.append(current)
        difference = _largest_difference(MODELS / name, rebuilt / name)
        note = f"{'current' if current else 'STALE'} settings and rows; weights differ by up to {difference:.1e}"
        table.add_row(name, "", "", "", note)
    Console().print(table)
    return all(verdicts)


def _largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between two models' weights, or infinity if they have other shapes."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (first, second))
    if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in others.items()}:
        return float("inf")
    return max(float((value.float() - others[name].float()).abs().max()) for name, value in weights.items())


if __name__ == "__main__":
    main()
