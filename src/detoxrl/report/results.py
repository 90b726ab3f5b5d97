"""Which result does a run folder hold?"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from detoxrl.report.words import kept_initial
from detoxrl.runtime.files import explain_corruption
from detoxrl.runtime.run_files import require_contents
from detoxrl.runtime.run_folder import INITIAL_KEPT, RunFolder

Validation = dict[str, Any]  # a line of validation.jsonl


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file. Raises StorageError if a line is torn or lacks what it has to hold."""
    with explain_corruption(path, "put the file back, or make the stage that writes it again"):
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        require_contents(path.name, records)
    return records


def read_validations(folder: RunFolder) -> list[Validation]:
    """Return what training measured on the validation prompts; the initial policy comes first."""
    return read_lines(folder.require_product("validation.jsonl", "train"))


def used_rows(folder: RunFolder, use: str) -> int:
    """Return how many rows of the data were used for "train", "validation" or "test"."""
    splits = folder.read_json("rows.json")["splits"].values()
    return sum(split.get(f"used for {use}", 0) for split in splits)


def read_evaluation(folder: RunFolder) -> dict[str, Any]:
    """Return eval.json. Where training kept the initial policy, nothing in it is compared with "after".

    Earlier versions of detoxrl compared the initial policy with itself; what they wrote is read without that.
    """
    evaluation: dict[str, Any] = folder.read_json("eval.json")
    if folder.kept_initial_policy() and not kept_initial(evaluation):
        return _without_comparison(evaluation)
    return evaluation


def _without_comparison(evaluation: dict[str, Any]) -> dict[str, Any]:
    evaluation = deepcopy(evaluation)
    for result in evaluation["toxicity"].values():
        result.update({"difference": None, "relative": None, "share_removed": None, "verdict": INITIAL_KEPT})
    for result in evaluation["quality"].values():
        result["difference"] = None
    for split in evaluation["splits"].values():
        for name in split.keys() - {"n"}:
            split[name]["difference"] = None
    return evaluation
