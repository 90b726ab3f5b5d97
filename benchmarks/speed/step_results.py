"""What do the rows of benchmarks/step_speed.py say? Medians, ratios, checks, Markdown and figures."""

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
# Okabe and Ito's colours. trl does not part encoding from what needs it.
STAGES = {"encode": "#56B4E9", "sample": "#0072B2", "log-probs": "#009E73", "score": "#999999", "update": "#E69F00"}
OURS, FLOOR, SLACK = "detoxrl", "floor", 0.1
"""SLACK: by how much a ratio of times may exceed the ratio of sizes before it is called faster than linear."""
AXES = {
    "batch": "prompts per step", "prompt": "tokens per prompt", "response": "tokens per response",
    "size": "million parameters", "epochs": "epochs", "prompts": "prompts in the data set",
}  # fmt: skip
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "detoxrl", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.titlesize": 9,
    "axes.titlelocation": "left", "xtick.labelsize": 8, "ytick.labelsize": 8,
}  # fmt: skip


def read_rows(file: Path) -> Rows:
    """Return the rows of a .jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def _stages(rows: Rows) -> dict[str, float]:
    return {stage: median(row["stages"][stage] for row in rows) for stage in STAGES if stage in rows[0]["stages"]}


# Against trl and the floor


def summary(rows: Rows) -> dict[str, Any]:
    """Return each contestant's medians by precision, and ratios of seconds, each of steps of one round."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["contestant"], row["dtype"]), []).append(row)
    contestants = []
    for (name, dtype), some in groups.items():
        seconds, peak = _spread([row["seconds"] for row in some]), max(row["peak_gib"] for row in some)
        processor = median(row["processor_seconds"] for row in some)
        tokens = some[0]["step"]["batch"] * some[0]["step"]["response"]
        one = {"contestant": name, "dtype": dtype, "seconds": seconds, "stages": _stages(some), "peak_gib": peak}
        one |= {"processor_seconds": processor, "tokens_per_second": tokens / seconds["median"], "rounds": len(some)}
        rated = [key for key in some[0] if key.endswith("GFLOP/s") or key in ("plain_seconds", "gflop")]
        contestants.append(one | {key: median(row[key] for row in some) for key in rated})
    pairs = [(one, (OURS, one[1]), "seconds") for one in groups if one[0].startswith("trl")]
    pairs += [(one, (OURS, "bf16"), "seconds") for one in groups if one == ("trl per-prompt", "fp32")]
    pairs += [((OURS, dtype), (name, dtype), key) for name, dtype in groups if name == FLOOR
              for key in ("seconds", "plain_seconds")]  # fmt: skip
    ratios = []
    for one, other, key in pairs:
        if other in groups:
            found = [a["seconds"] / b[key] for a, b in zip(groups[one], groups[other], strict=False)]
            plain = " (PyTorch's own linear, feed-forward)" if key == "plain_seconds" else ""
            ratios.append({"of": " ".join(one), "to": " ".join(other) + plain} | _spread(found))
    return {"step": rows[0]["step"], "contestants": contestants, "ratios": ratios}


def compare_table(found: dict[str, Any]) -> str:
    """Return the comparison in Markdown."""
    lines = [f"| contestant | precision | s / step | {' | '.join(STAGES)} | processor s | tokens/s | peak GiB |",
             f"|---|---|--:|{'--:|' * len(STAGES)}--:|--:|--:|"]  # fmt: skip
    for one in found["contestants"]:
        seconds = one["seconds"]
        stages = " | ".join(f"{one['stages'][stage]:.2f}" if stage in one["stages"] else "" for stage in STAGES)
        peak = "" if one["contestant"] == FLOOR else f"{one['peak_gib']:.1f}"
        took = f"{seconds['median']:.2f} ({seconds['low']:.2f} to {seconds['high']:.2f})"
        processor = "" if one["contestant"] == FLOOR else f"{one['processor_seconds']:.1f}"
        row = (one["contestant"], one["dtype"], took, stages, processor, f"{one['tokens_per_second']:.0f}", peak)
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| ratio of seconds | median of rounds | range |", "|---|--:|---|"]
    for one in found["ratios"]:
        lines.append(f"| {one['of']} / {one['to']} | {one['median']:.2f} | {one['low']:.2f} to {one['high']:.2f} |")
    lines.append("")
    for one in found["contestants"]:
        if one["contestant"] == FLOOR:
            rates = ", ".join(f"{key.split()[0]} {one[key]:.0f}" for key in one if key.endswith("GFLOP/s"))
            best, plain = one["seconds"]["median"], one["plain_seconds"]
            what = f"{best:.2f} s at the best rate, {plain:.2f} s at that of PyTorch's own linear layer, feed-forward"
            lines.append(f"Floor in {one['dtype']}: {one['gflop']:.0f} GFLOP; {what} (GFLOP/s: {rates}).")
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    versions = "; ".join(f"{name}: {', '.join(f'{part} {number}' for part, number in parts.items())}"
                         for name, parts in found["versions"].items() if name != FLOOR)  # fmt: skip
    return "\n".join([*lines, "", f"{machine}; {found['contestants'][0]['rounds']} rounds. {versions}."])


def draw_compare(found: dict[str, Any], file: Path) -> None:
    """Draw the seconds of a step by stage, a panel for each precision."""
    dtypes = list(dict.fromkeys(one["dtype"] for one in found["contestants"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 1.5 * len(dtypes)), layout="constrained")
        panels: Iterable[Axes] = figure.subplots(len(dtypes), 1, sharex=True, squeeze=False)[:, 0]
        order = ("trl per-prompt", "trl batched", OURS, FLOOR)
        for dtype, axes in zip(dtypes, panels, strict=True):
            some = {one["contestant"]: one for one in found["contestants"] if one["dtype"] == dtype}
            names = [name for name in order if name in some]
            for height, name in enumerate(names):
                left = 0.0
                for stage, colour in STAGES.items():
                    seconds = some[name]["stages"].get(stage, 0.0)
                    label = stage if name == OURS else None
                    axes.barh(height, seconds, left=left, color=colour, height=0.7, label=label)
                    left += seconds
                axes.text(left, height, f" {some[name]['seconds']['median']:.1f} s", va="center", fontsize=8)
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.set_title(dtype)
            axes.margins(x=0.08)
        axes.set_xlabel("seconds of one step")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=len(STAGES), frameon=False)
        _save(figure, file)


# Against its own sizes


def curves(rows: Rows) -> dict[str, dict[float, Rows]]:
    """Return for each size the rows of each of its values, all else as usual; one of them is the usual step."""
    points: dict[str, Rows] = {}
    for row in rows:
        points.setdefault(json.dumps([row["size"], row["step"]]), []).append(row)
    usual, *others = points.values()  # the first is the usual step
    found: dict[str, dict[float, Rows]] = {}
    for axis in AXES:
        at = {_value(some[0], axis): some for some in others if _differs(some[0], usual[0]) == axis}
        if at:
            found[axis] = dict(sorted((at | {_value(usual[0], axis): usual}).items()))
    return found


def _value(row: dict[str, Any], axis: str) -> float:
    return float(round(row["parameters"] / 1e6)) if axis == "size" else row["step"][axis]


def _differs(row: dict[str, Any], usual: dict[str, Any]) -> str:
    return next((axis for axis in row["step"] if row["step"][axis] != usual["step"][axis]), "size")


def cost_table(rows: Rows) -> str:
    """Return our own cost against each size in Markdown."""
    lines = [f"| size | value | s / step | {' | '.join(STAGES)} |", f"|---|--:|--:|{'--:|' * len(STAGES)}"]
    for axis, curve in curves(rows).items():
        for value, some in curve.items():
            seconds, stages = _spread([row["seconds"] for row in some]), _stages(some)
            took = f"{seconds['median']:.2f} ({seconds['low']:.2f} to {seconds['high']:.2f})"
            lines.append(
                f"| {AXES[axis]} | {value:g} | {took} | {' | '.join(f'{stages[one]:.2f}' for one in STAGES)} |"
            )
    return "\n".join([*lines, ""])


def check_lines(rows: Rows) -> list[str]:
    """Return what must hold of the cost, and whether it does."""
    found, said = curves(rows), []
    seconds = {axis: {value: median(row["seconds"] for row in some) for value, some in curve.items()}
               for axis, curve in found.items()}  # fmt: skip
    for axis in ("batch", "response", "prompt"):
        took = list(seconds.get(axis, {}).items())
        for (small, before), (large, after) in pairwise(took):
            ratio, holds = after / before, after / before <= large / small * (1 + SLACK)
            said.append(f"- {AXES[axis]} {small:g} to {large:g}: {ratio:.2f} times the time, "
                        f"{'no faster' if holds else 'FASTER'} than linear")  # fmt: skip
    if "epochs" in found:
        (_, first), (passes, second), *_ = found["epochs"].items()
        stages, more = _stages(first), _stages(second)
        grown = {stage: more[stage] - stages[stage] for stage in ("encode", "update")}
        took = seconds["epochs"][passes] - seconds["epochs"][1]
        read = max(row["encoded"] for row in second)
        said.append(f"- a second epoch: {took:.2f} s more, {grown['update']:.2f} of them in the update, "
                    f"{grown['encode']:.2f} in the encoder; a prompt is encoded {read:g} time(s)")  # fmt: skip
    if "prompts" in found:
        times = seconds["prompts"].values()
        said.append(f"- prompts in the data set: the slowest is {max(times) / min(times):.2f} times the fastest")
    return said


def draw_cost(rows: Rows, file: Path) -> None:
    """Draw the seconds of a step against each size on logarithmic axes, and what growth in proportion would be."""
    found = curves(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.2 * -(-len(found) // 3)), layout="constrained")
        panels = figure.subplots(-(-len(found) // 3), 3, sharey=True, squeeze=False).flat
        for (axis, curve), axes in zip(found.items(), panels, strict=False):
            values, first = list(curve), median(row["seconds"] for row in next(iter(curve.values())))
            took = [_spread([row["seconds"] for row in some]) for some in curve.values()]
            if axis != "prompts":
                axes.plot(values, [first * value / values[0] for value in values], "--", color="#999999", linewidth=0.8)
            axes.vlines(values, [one["low"] for one in took], [one["high"] for one in took], color="#0072B2")
            axes.plot(values, [one["median"] for one in took], "o-", color="#0072B2", markersize=3, linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_title(AXES[axis])
        for axes in panels:
            axes.set_axis_off()
        figure.supylabel("seconds of one step", fontsize=9)
        _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    # matplotlib writes blanks at the ends of lines.
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")
