"""How well do the ratings of judges fit labels, and how is that written in a table?"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detoxrl.data.labelled import Example
from detoxrl.evaluation.classifier_metrics import METRICS, Json, Rated
from detoxrl.evaluation.judges import Judge, memoized
from detoxrl.evaluation.statistics import Floats
from detoxrl.report.words import number
from detoxrl.runtime.console import progress
from judged_sets import PERSPECTIVE_SCORES, Labelled, read_perspective

# Texts between two steps of the progress display.
_BATCH = 256
# A display of fewer texts would be gone before it can be read.
_FEWEST_WATCHED = 1000
# Resamples drawn at a time; bounds the memory that many texts take.
_BLOCK = 50


class Table(NamedTuple):
    """A table of results. The caption says of which texts, and what the columns do not."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is measured: judges by name, on sets in the folder `root`."""

    root: Path
    loaded: Mapping[str, Judge]
    scores_of: str | None = None  # A judge with several of Perspective's scores; None: there is none.
    score_labels: Sequence[str] = PERSPECTIVE_SCORES  # Which of its scores are measured.
    texts: int = 4000  # Maximum number of texts of a set.
    held_out: float = 0.1  # Share of the rows of RealToxicityPrompts that do not train; half of it is measured.
    resamples: int = 1000
    seed: int = 0

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """The judges, each of which rates a text once and shows its progress."""
        return {name: memoized(_watched(name, judge)) for name, judge in self.loaded.items()}

    @cached_property
    def perspective(self) -> list[Example]:
        """The texts of RealToxicityPrompts that `detoxrl fit` keeps for its test."""
        return read_perspective(self.root, self.held_out, self.seed)


def _watched(name: str, judge: Judge) -> Judge:
    def rate(texts: Sequence[str]) -> Floats:
        if len(texts) < _FEWEST_WATCHED:
            return judge(texts)

        ratings = []
        with progress(name, len(texts)) as reach:
            for start in range(0, len(texts), _BATCH):
                batch = texts[start : start + _BATCH]
                ratings.append(judge(batch))
                reach(start + len(batch), "")
        return np.concatenate(ratings)

    return rate


def rated(judge: Judge, labelled: Sequence[Labelled]) -> Rated:
    """Return a judge's ratings of texts beside their labels."""
    labels = np.array([float(example.positive) for example in labelled])
    return Rated(judge([example.text for example in labelled]), labels)


def value(metric: str, ratings: Rated) -> float | None:
    """Return a metric of METRICS, None where it is not defined."""
    return _defined(METRICS[metric](ratings, np.ones((1, len(ratings.labels)))))[0]


def intervals(
    metrics: Sequence[str], ratings: Rated, units: Sequence[Hashable], resamples: int, seed: int
) -> dict[str, Json]:
    """Return metrics as value, low and high: the 95 % interval by the percentile bootstrap over units.

    All texts of a unit are drawn together. Each number is None where it is not defined.
    """
    numbers = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    unit_of = np.array([numbers[unit] for unit in units])
    rng = np.random.default_rng(seed)

    resampled: dict[str, list[Floats]] = {metric: [] for metric in metrics}
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        counts = rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=size)
        weights = counts[:, unit_of].astype(np.float64)
        for metric in metrics:
            resampled[metric].append(METRICS[metric](ratings, weights))

    results = {}
    for metric in metrics:
        values = np.concatenate(resampled[metric])
        defined = values[np.isfinite(values)]
        low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (None, None)
        results[metric] = {"value": value(metric, ratings), "low": low, "high": high}
    return results


def _defined(values: Floats) -> list[float | None]:
    return [float(number) if np.isfinite(number) else None for number in values]


def mean(ratings: Floats) -> str:
    """Return the mean of ratings as a cell; a dash for none."""
    return number(float(ratings.mean()) if len(ratings) else None)


def percentage(share: float | None) -> str:
    """Return a share in percent as a cell; a dash for none."""
    return number(None) if share is None else f"{100 * share:.1f} %"


def to_markdown(name: str, table: Table) -> str:
    """Return a table in Markdown behind the mark at which a page shows it."""
    lines = [f"<!-- table: {name} -->", table.caption, ""]
    lines.append(f"| {' | '.join(table.columns)} |")
    lines.append("|---" * len(table.columns) + "|")
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


TableMaker = Callable[[Benchmark], Table]
