"""How does a result on real data go on after a stop, and what is kept of it, so that its tables can be made again?

Numbers and plots are kept, and no text: the sets are offensive, and some may not be passed on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import detoxrl
from detoxrl.commands.fit import resume_fit
from detoxrl.commands.fit_check import SETTINGS, unfinished_folder
from detoxrl.report.plots import frontier_plot, over_optimisation, standalone
from detoxrl.report.results import read_lines
from detoxrl.report.words import validation_quality_name
from detoxrl.runtime.run_folder import IfExists

RESULTS = Path(__file__).parents[2] / "docs" / "results"
KEPT = ("eval.json", "metrics.jsonl", "validation.jsonl")
# Its entries are settings, which may be paths.
_LEFT_OUT = "changed_on_its_way"


def fitted(source: str, folder: Path, settings: Mapping[str, Any]) -> Path:
    """Return the folder of a fit, which is made unless it is there; one that was stopped is finished."""
    if (unfinished_folder(folder) / SETTINGS).is_file():
        resume_fit(folder)
    elif not folder.is_dir():
        detoxrl.fit(source, folder, settings)
    return folder


def how_to_go_on(folder: Path) -> IfExists:
    """Return what to do with a folder that an earlier call may have begun."""
    return "resume" if folder.exists() else "error"


def keep_run(run: Path, target: Path) -> None:
    """Copy the numbers of a run, and draw its validations."""
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT[1:]:
        shutil.copyfile(run / name, target / name)

    evaluation = read_json(run / "eval.json")
    del evaluation[_LEFT_OUT]
    (target / KEPT[0]).write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")

    checkpoint = read_json(run / "checkpoint.json")
    quality = validation_quality_name(checkpoint["quality_by"])
    (plot,) = over_optimisation(read_lines(run / "validation.jsonl"), checkpoint, quality)
    (target / "validations.svg").write_text(standalone(plot.svg), encoding="utf-8")


def keep_sweep(sweep: Path, target: Path) -> None:
    """Copy the numbers of a sweep, and draw its frontier."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(sweep / "sweep.json", target / "sweep.json")
    plot = frontier_plot(read_json(sweep / "sweep.json"))
    (target / "frontier.svg").write_text(standalone(plot.svg), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
