"""How well do judges tell texts that people called toxic, hateful or unsafe from others?"""

from __future__ import annotations

from collections.abc import Sequence

from detoxrl.evaluation.classifier_metrics import Rated
from detoxrl.report.fit_words import with_interval
from detoxrl.report.words import number
from detoxrl.runtime.console import log
from judge_measures import Benchmark, Table, intervals, mean, percentage, rated, value
from judged_sets import DIASAFETY, DIASAFETY_IN_CONTEXT, JUDGED_SETS, TOXIGEN, JudgedSet, Labelled, read_set


def sets(benchmark: Benchmark) -> Table:
    """Return how each judge fits the labels of each set that is there."""
    read = {judged.name: _read(judged, benchmark) for judged in JUDGED_SETS if _is_there(judged, benchmark)}
    _rate_all(list(read.values()), benchmark)

    rows = []
    for set_name, labelled in read.items():
        positive = sum(example.positive for example in labelled)
        described = f"{set_name} ({positive:,} positive of {len(labelled):,})"
        units = [example.unit for example in labelled]
        for judge_name, judge in benchmark.judges.items():
            ratings = rated(judge, labelled)
            auc = intervals(["auc"], ratings, units, benchmark.resamples, benchmark.seed)["auc"]
            rows.append([described, judge_name, with_interval(auc), *_errors(ratings)])

    caption = "False alarms are negative texts judged 0.5 or above, misses are positive ones judged below."
    columns = [
        "set", "judge", "AUC", "recall at precision 0.9", "mean of positive, negative", "false alarms", "misses",
    ]  # fmt: skip
    return Table(caption, columns, rows)


def groups(benchmark: Benchmark) -> Table:
    """Return the AUC of each judge on implicit hate against each group of ToxiGen."""
    labelled = _read(TOXIGEN, benchmark)
    rows = []
    for group in sorted({example.group for example in labelled}):
        members = [example for example in labelled if example.group == group]
        hateful = sum(example.positive for example in members)
        aucs = [number(value("auc", rated(judge, members))) for judge in benchmark.judges.values()]
        rows.append([group, f"{hateful}, {len(members) - hateful}", *aucs])

    caption = f"{TOXIGEN.name}: AUC by the group that a text is about."
    return Table(caption, ["group", "hate, neutral", *benchmark.judges], rows)


def context(benchmark: Benchmark) -> Table:
    """Return the AUC of each judge on DiaSafety by category, for responses alone and behind their contexts."""
    alone, in_context = (_read(judged, benchmark) for judged in (DIASAFETY, DIASAFETY_IN_CONTEXT))
    rows = []
    for category in sorted({example.group for example in alone}):
        for name, judge in benchmark.judges.items():
            members, members_in_context = (
                [example for example in labelled if example.group == category] for labelled in (alone, in_context)
            )
            unsafe = sum(example.positive for example in members)
            aucs = [number(value("auc", rated(judge, examples))) for examples in (members, members_in_context)]
            rows.append([category, name, f"{unsafe}, {len(members) - unsafe}", *aucs])
    return Table(
        "DiaSafety, test: AUC of unsafe against safe responses.",
        ["category", "judge", "unsafe, safe", "response alone", "context and response"],
        rows,
    )


def _read(judged: JudgedSet, benchmark: Benchmark) -> list[Labelled]:
    return read_set(judged, benchmark.root, benchmark.texts, benchmark.seed)


def _is_there(judged: JudgedSet, benchmark: Benchmark) -> bool:
    """Return whether the folder of a set exists; say so if it does not."""
    is_there = (benchmark.root / judged.folder).is_dir()
    if not is_there:
        log.print(f"skipped {judged.name}: {benchmark.root} has no folder {judged.folder}", soft_wrap=True)
    return is_there


def _rate_all(read: Sequence[Sequence[Labelled]], benchmark: Benchmark) -> None:
    """Let each judge rate the texts of all sets at once, so that one progress display counts them."""
    texts = [example.text for labelled in read for example in labelled]
    for judge in benchmark.judges.values():
        judge(texts)


def _errors(ratings: Rated) -> list[str]:
    """Return recall at precision 0.9, the means of positive and negative texts, false alarms and misses as cells."""
    positive = ratings.positive > 0
    toxic = ratings.predicted > 0
    false_alarm_rate = float(toxic[~positive].mean()) if not positive.all() else None
    miss_rate = float((~toxic[positive]).mean()) if positive.any() else None
    return [
        number(value("recall_at_precision_0.9", ratings)),
        f"{mean(ratings.probabilities[positive])}, {mean(ratings.probabilities[~positive])}",
        percentage(false_alarm_rate),
        percentage(miss_rate),
    ]
