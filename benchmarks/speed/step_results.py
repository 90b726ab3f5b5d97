"""What do the rows of step_speed.py show? Medians, ratios, checks, Markdown tables and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
# Okabe and Ito's colours. trl does not separate encoding from the stages that need it.
STAGES = {"encode": "#56B4E9", "sample": "#0072B2", "log-probs": "#009E73", "score": "#999999", "update": "#E69F00"}
OURS = "detoxrl"
FLOOR = "floor"
DRAWN = ("trl per-prompt", "trl batched", OURS, FLOOR)  # From top to bottom.
SLACK = 0.1  # The tolerance of the check that time grows at most linearly with a size.
AXES = {
    "batch": "prompts per step", "prompt": "tokens per prompt", "response": "tokens per response",
    "size": "million parameters", "epochs": "epochs", "prompts": "prompts in the data set",
}  # fmt: skip
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "detoxrl", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.titlesize": 9,
    "axes.titlelocation": "left", "xtick.labelsize": 8, "ytick.labelsize": 8,
}  # fmt: skip
# Leaves out the date and the version of matplotlib, so that the same figure is the same file.
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def read_rows(file: Path) -> Rows:
    """Return the rows of a .jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def median_and_range(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and the lowest and highest value."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def _stages(rows: Rows) -> dict[str, float]:
    return {stage: median(row["stages"][stage] for row in rows) for stage in STAGES if stage in rows[0]["stages"]}


# Against trl and the floor


def summary(rows: Rows) -> dict[str, Any]:
    """Return each contestant's medians by precision, and the ratios of seconds between steps of the same round."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["contestant"], row["dtype"]), []).append(row)
    contestants = [_contestant(name, dtype, group) for (name, dtype), group in groups.items()]
    return {"step": rows[0]["step"], "contestants": contestants, "ratios": _ratios(groups)}


def _contestant(name: str, dtype: str, group: Rows) -> dict[str, Any]:
    """Return the medians of a contestant in one precision."""
    seconds = median_and_range([row["seconds"] for row in group])
    tokens = group[0]["step"]["batch"] * group[0]["step"]["response"]
    medians = {
        "contestant": name,
        "dtype": dtype,
        "seconds": seconds,
        "stages": _stages(group),
        "peak_gib": max(row["peak_gib"] for row in group),
        "processor_seconds": median(row["processor_seconds"] for row in group),
        "tokens_per_second": tokens / seconds["median"],
        "rounds": len(group),
    }
    for key in group[0]:
        if key.endswith("GFLOP/s") or key in ("plain_seconds", "gflop"):
            medians[key] = median(row[key] for row in group)
    return medians


def _ratios(groups: dict[tuple[str, str], Rows]) -> list[dict[str, Any]]:
    """Return how many times longer trl's step takes than detoxrl's, and detoxrl's than the floor."""
    pairs = []
    for name, dtype in groups:
        if name.startswith("trl"):
            pairs.append(((name, dtype), (OURS, dtype), "seconds"))
    if ("trl per-prompt", "fp32") in groups:
        pairs.append((("trl per-prompt", "fp32"), (OURS, "bf16"), "seconds"))
    for name, dtype in groups:
        if name == FLOOR:
            pairs.append(((OURS, dtype), (name, dtype), "seconds"))
            pairs.append(((OURS, dtype), (name, dtype), "plain_seconds"))

    ratios = []
    for slower, faster, key in pairs:
        if faster not in groups:
            continue
        rounds = zip(groups[slower], groups[faster], strict=False)
        spread = median_and_range([row["seconds"] / other[key] for row, other in rounds])
        note = " (PyTorch's own linear, feed-forward)" if key == "plain_seconds" else ""
        ratios.append({"of": " ".join(slower), "to": " ".join(faster) + note, **spread})
    return ratios


def compare_table(compared: dict[str, Any]) -> str:
    """Return the comparison in Markdown."""
    lines = [
        f"| contestant | precision | s / step | {' | '.join(STAGES)} | processor s | tokens/s | peak GiB |",
        f"|---|---|--:|{'--:|' * len(STAGES)}--:|--:|--:|",
    ]
    for contestant in compared["contestants"]:
        lines.append(f"| {' | '.join(_compare_cells(contestant))} |")

    lines += ["", "| ratio of seconds | median of rounds | range |", "|---|--:|---|"]
    for ratio in compared["ratios"]:
        spread = f"{ratio['median']:.2f} | {ratio['low']:.2f} to {ratio['high']:.2f}"
        lines.append(f"| {ratio['of']} / {ratio['to']} | {spread} |")

    lines.append("")
    for contestant in compared["contestants"]:
        if contestant["contestant"] == FLOOR:
            lines.append(_floor_line(contestant))

    machine = ", ".join(f"{key} {value}" for key, value in compared["machine"].items())
    versions = []
    for name, packages in compared["versions"].items():
        if name != FLOOR:
            numbers = ", ".join(f"{package} {number}" for package, number in packages.items())
            versions.append(f"{name}: {numbers}")
    rounds = compared["contestants"][0]["rounds"]
    return "\n".join([*lines, "", f"{machine}; {rounds} rounds. {'; '.join(versions)}."])


def _compare_cells(contestant: dict[str, Any]) -> list[str]:
    stages = contestant["stages"]
    is_floor = contestant["contestant"] == FLOOR
    return [
        contestant["contestant"],
        contestant["dtype"],
        _seconds_cell(contestant["seconds"]),
        *(f"{stages[stage]:.2f}" if stage in stages else "" for stage in STAGES),
        "" if is_floor else f"{contestant['processor_seconds']:.1f}",
        f"{contestant['tokens_per_second']:.0f}",
        "" if is_floor else f"{contestant['peak_gib']:.1f}",
    ]


def _seconds_cell(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def _floor_line(floor: dict[str, Any]) -> str:
    rates = ", ".join(f"{key.split()[0]} {floor[key]:.0f}" for key in floor if key.endswith("GFLOP/s"))
    best = f"{floor['seconds']['median']:.2f} s at the best rate"
    plain = f"{floor['plain_seconds']:.2f} s at that of PyTorch's own linear layer, feed-forward"
    return f"Floor in {floor['dtype']}: {floor['gflop']:.0f} GFLOP; {best}, {plain} (GFLOP/s: {rates})."


def draw_compare(compared: dict[str, Any], file: Path) -> None:
    """Draw the seconds of a step by stage, one panel for each precision."""
    contestants = compared["contestants"]
    dtypes = list(dict.fromkeys(contestant["dtype"] for contestant in contestants))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 1.5 * len(dtypes)), layout="constrained")
        panels: Iterable[Axes] = figure.subplots(len(dtypes), 1, sharex=True, squeeze=False)[:, 0]
        for dtype, axes in zip(dtypes, panels, strict=True):
            group = {row["contestant"]: row for row in contestants if row["dtype"] == dtype}
            _draw_bars(axes, [group[name] for name in DRAWN if name in group])
            axes.set_title(dtype)
        axes.set_xlabel("seconds of one step")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=len(STAGES), frameon=False)
        _save(figure, file)


def _draw_bars(axes: Axes, contestants: Rows) -> None:
    """Draw a bar for each contestant, with one part for each stage."""
    for height, contestant in enumerate(contestants):
        left = 0.0
        for stage, colour in STAGES.items():
            seconds = contestant["stages"].get(stage, 0.0)
            label = stage if contestant["contestant"] == OURS else None
            axes.barh(height, seconds, left=left, color=colour, height=0.7, label=label)
            left += seconds
        axes.text(left, height, f" {contestant['seconds']['median']:.1f} s", va="center", fontsize=8)

    axes.set_yticks(range(len(contestants)), [contestant["contestant"] for contestant in contestants])
    axes.invert_yaxis()
    axes.margins(x=0.08)


# Against its own sizes


def curves(rows: Rows) -> dict[str, dict[float, Rows]]:
    """Return for each size the rows of each value, with the default for every other size."""
    points: dict[str, Rows] = {}
    for row in rows:
        points.setdefault(json.dumps([row["size"], row["step"]]), []).append(row)
    usual, *others = points.values()  # The default step comes first.

    by_axis: dict[str, dict[float, Rows]] = {}
    for axis in AXES:
        curve = {_value(group[0], axis): group for group in others if _changed_axis(group[0], usual[0]) == axis}
        if curve:
            curve[_value(usual[0], axis)] = usual
            by_axis[axis] = dict(sorted(curve.items()))
    return by_axis


def _value(row: dict[str, Any], axis: str) -> float:
    return float(round(row["parameters"] / 1e6)) if axis == "size" else row["step"][axis]


def _changed_axis(row: dict[str, Any], usual: dict[str, Any]) -> str:
    for axis in row["step"]:
        if row["step"][axis] != usual["step"][axis]:
            return str(axis)
    return "size"


def cost_table(rows: Rows) -> str:
    """Return the cost of detoxrl's step for each size in Markdown."""
    lines = [f"| size | value | s / step | {' | '.join(STAGES)} |", f"|---|--:|--:|{'--:|' * len(STAGES)}"]
    for axis, curve in curves(rows).items():
        for value, group in curve.items():
            stages = _stages(group)
            seconds = _seconds_cell(median_and_range([row["seconds"] for row in group]))
            cells = [AXES[axis], f"{value:g}", seconds, *(f"{stages[stage]:.2f}" for stage in STAGES)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def check_lines(rows: Rows) -> list[str]:
    """Return one line for each property that the cost must have, and whether it has it."""
    by_axis = curves(rows)
    seconds: dict[str, dict[float, float]] = {}
    for axis, curve in by_axis.items():
        seconds[axis] = {value: median(row["seconds"] for row in group) for value, group in curve.items()}

    lines = []
    for axis in ("batch", "response", "prompt"):
        points = list(seconds.get(axis, {}).items())
        for (small, before), (large, after) in pairwise(points):
            is_linear = after / before <= large / small * (1 + SLACK)
            growth = f"{AXES[axis]} {small:g} to {large:g}: {after / before:.2f} times the time"
            lines.append(f"- {growth}, {'no faster' if is_linear else 'FASTER'} than linear")
    if "epochs" in by_axis:
        lines.append(_epoch_line(by_axis["epochs"], seconds["epochs"]))
    if "prompts" in by_axis:
        slowest, fastest = max(seconds["prompts"].values()), min(seconds["prompts"].values())
        lines.append(f"- prompts in the data set: the slowest is {slowest / fastest:.2f} times the fastest")
    return lines


def _epoch_line(curve: dict[float, Rows], seconds: dict[float, float]) -> str:
    """Return what a second epoch costs, and where."""
    (_, first), (epochs, second), *_ = curve.items()
    stages_of_first = _stages(first)
    stages_of_second = _stages(second)
    more = {stage: stages_of_second[stage] - stages_of_first[stage] for stage in ("encode", "update")}
    encoded = max(row["encoded"] for row in second)
    return (
        f"- a second epoch: {seconds[epochs] - seconds[1]:.2f} s more, {more['update']:.2f} of them in the update, "
        f"{more['encode']:.2f} in the encoder; a prompt is encoded {encoded:g} time(s)"
    )


def draw_cost(rows: Rows, file: Path) -> None:
    """Draw the seconds of a step against each size on logarithmic axes, with a line for linear growth."""
    by_axis = curves(rows)
    panel_rows = -(-len(by_axis) // 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.2 * panel_rows), layout="constrained")
        panels = figure.subplots(panel_rows, 3, sharey=True, squeeze=False).flat
        for (axis, curve), axes in zip(by_axis.items(), panels, strict=False):
            _draw_curve(axes, axis, curve)
        for axes in panels:
            axes.set_axis_off()
        figure.supylabel("seconds of one step", fontsize=9)
        _save(figure, file)


def _draw_curve(axes: Axes, axis: str, curve: dict[float, Rows]) -> None:
    """Draw the seconds of a step against one size."""
    values = list(curve)
    spreads = [median_and_range([row["seconds"] for row in group]) for group in curve.values()]
    if axis != "prompts":
        linear = [spreads[0]["median"] * value / values[0] for value in values]
        axes.plot(values, linear, "--", color="#999999", linewidth=0.8)
    lows = [spread["low"] for spread in spreads]
    highs = [spread["high"] for spread in spreads]
    axes.vlines(values, lows, highs, color="#0072B2")
    axes.plot(values, [spread["median"] for spread in spreads], "o-", color="#0072B2", markersize=3, linewidth=1)

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(AXES[axis])


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    # matplotlib writes trailing blanks.
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")
