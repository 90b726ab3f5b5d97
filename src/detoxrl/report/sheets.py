"""What goes into the spreadsheets, for reading and for blind rating?"""

import csv
import io
import random
from collections.abc import Sequence
from typing import Any

from detoxrl.config.tasks import Task

# A spreadsheet would run a cell that starts with one of these as a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def samples_sheet(samples: list[dict[str, Any]], judge: str, task: Task, *, with_after: bool = True) -> str:
    """Return, as CSV, a row per prompt with each policy's first response and its toxicity by `judge`."""
    policies = [policy for policy in samples[0]["responses"] if with_after or policy != "after"]
    header = ["id", task.text, task.reference]
    for policy in policies:
        header += [f"{policy}_response", f"{policy}_toxicity"]

    rows = []
    for sample in samples:
        row = [sample["id"], sample["text"], "\n".join(sample["references"])]
        for policy in policies:
            row += [sample["responses"][policy][0], sample["toxicity"][judge][policy][0]]
        rows.append(row)

    return _csv(header, rows)


def compared_sheet(samples: list[dict[str, Any]]) -> str:
    """Return, as CSV, the first responses before and after with their reward scores, largest gain first.

    The columns are those of the course notebook (docs/from-the-notebook.md).
    """
    rows = []
    for sample in samples:
        responses = [sample["responses"][side][0] for side in ("before", "after")]
        rewards = [sample["score"][side][0] for side in ("before", "after")]
        difference = round(rewards[1] - rewards[0], 4)
        rows.append([sample["text"], *responses, *rewards, difference])

    rows.sort(key=lambda row: float(row[-1]), reverse=True)
    header = ["query", "response_before", "response_after", "reward_before", "reward_after", "reward_difference"]
    return _csv(header, rows)


def blind_sheets(samples: list[dict[str, Any]], seed: int, task: Task) -> tuple[str, str]:
    """Return, as CSV, a sheet for raters and its key.

    Each row is a prompt whose first responses before and after differ. `seed` shuffles the rows, and which response is
    on the left. Only the key says which is which.
    """
    generator = random.Random(f"blind {seed}")
    rated = differing(samples)
    generator.shuffle(rated)

    sheet = []
    key = []
    for number, sample in enumerate(rated, start=1):
        left, right = generator.sample(("before", "after"), 2)
        responses = sample["responses"]
        sheet.append([number, sample["text"], responses[left][0], responses[right][0], "", ""])
        key.append([number, sample["id"], left, right])

    header = ["number", task.text, "left", "right", "more_civil", "better"]
    return _csv(header, sheet), _csv(["number", "id", "left", "right"], key)


def differing(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples whose first responses before and after differ: only these can be rated."""
    return [sample for sample in samples if sample["responses"]["before"][0] != sample["responses"]["after"][0]]


def _csv(header: list[str], rows: Sequence[Sequence[Any]]) -> str:
    # All text is quoted, so that line breaks stay inside their cell; the BOM tells Excel that the file is UTF-8.
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([_as_text(cell) for cell in row])

    return "\ufeff" + text.getvalue()


def _as_text(cell: Any) -> Any:
    """Return the cell, with an apostrophe before text that a spreadsheet would take for a formula."""
    runs = isinstance(cell, str) and cell.startswith(_FORMULA_STARTS)
    return f"'{cell}" if runs else cell
