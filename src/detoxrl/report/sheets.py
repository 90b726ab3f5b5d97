"""What goes into a spreadsheet, for reading and for blind rating?"""

import csv
import io
import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

# A spreadsheet would run a cell that starts with one of these as a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def samples_sheet(samples: list[dict[str, Any]], judge: str) -> str:
    """Return, as CSV, a row per prompt with each policy's first response and its toxicity by `judge`."""
    policies = list(samples[0]["responses"])
    header = ["id", "dialogue", "reference"]
    header += [f"{policy}_{what}" for policy in policies for what in ("response", "toxicity")]
    rows = []
    for sample in samples:
        rated = [(sample["responses"][policy][0], sample["toxicity"][judge][policy][0]) for policy in policies]
        rows.append([sample["id"], sample["dialogue"], sample["reference"], *chain(*rated)])
    return _csv(header, rows)


def compared_sheet(samples: list[dict[str, Any]]) -> str:
    """Return, as CSV, the table of the old notebooks: first responses with their reward, the largest gain first."""
    rows: list[list[Any]] = []
    for sample in samples:
        before, after = ([sample[what][side][0] for what in ("responses", "score")] for side in ("before", "after"))
        rows.append([sample["dialogue"], before[0], after[0], before[1], after[1], round(after[1] - before[1], 4)])
    header = ["query", "response_before", "response_after", "reward_before", "reward_after", "reward_difference"]
    return _csv(header, sorted(rows, key=lambda row: float(row[-1]), reverse=True))


def blind_sheets(samples: list[dict[str, Any]], seed: int) -> tuple[str, str]:
    """Return, as CSV, a sheet for raters and the key to it.

    A row is a prompt whose first responses before and after differ; which of them stands left, and the order of the
    rows, are shuffled by `seed`. The sheet does not say which is which, the key does.
    """
    draw = random.Random(f"blind {seed}")
    rated = differing(samples)
    draw.shuffle(rated)
    sheet, key = list[Sequence[object]](), list[Sequence[object]]()
    for number, sample in enumerate(rated, start=1):
        sides = draw.sample(("before", "after"), 2)
        sheet.append([number, sample["dialogue"], *(sample["responses"][side][0] for side in sides), "", ""])
        key.append([number, sample["id"], *sides])
    header = ["number", "dialogue", "left", "right", "more_civil", "better_summary"]
    return _csv(header, sheet), _csv(["number", "id", "left", "right"], key)


def differing(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the samples whose first responses before and after differ: only these can be rated."""
    return [sample for sample in samples if sample["responses"]["before"][0] != sample["responses"]["after"][0]]


def _csv(header: list[str], rows: Sequence[Sequence[Any]]) -> str:
    # All text in quotes, so that line breaks stay inside their cell; the BOM tells Excel that it is UTF-8.
    text = io.StringIO()
    sheet = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    sheet.writerow(header)
    for row in rows:
        formulas = [isinstance(cell, str) and cell.startswith(_FORMULA_STARTS) for cell in row]
        sheet.writerow(f"'{cell}" if runs else cell for cell, runs in zip(row, formulas, strict=True))
    return "\ufeff" + text.getvalue()
