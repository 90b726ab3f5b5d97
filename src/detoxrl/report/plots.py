"""How do curves and distributions become SVG that fits light and dark pages?"""

import io
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Drawn in this colour, then rewritten to the page's own text colour, which differs between light and dark.
_INK = "#010203"
_BEFORE, _AFTER, _KEPT, _QUALITY = "#d9822b", "#2f8fb8", "#8f8f8f", "#3f9a77"
# Inches: three panels fill the page's width, or two.
_THIRD, _HALF = (3.5, 2.0), (5.4, 2.4)
# Text stays text (small, searchable); the salt makes equal runs give equal files.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "detoxrl", "font.size": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.grid": True,
    "grid.color": _INK, "grid.alpha": 0.12, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


class Curve(NamedTuple):
    """One metric over the RL steps; `from_zero` starts its vertical axis at 0."""

    key: str
    title: str
    note: str
    from_zero: bool = False


class Plot(NamedTuple):
    """A drawing with its caption."""

    title: str
    note: str
    svg: Markup


CURVES = (
    Curve("score/mean", "Score", "of the reward, mean per rollout"),
    Curve("validation/toxicity", "Validation toxicity", "judge mean; band: one standard error", True),
    Curve("kl/reference", "KL to the reference", "nats per response", True),
    Curve("validation/quality", "Validation quality", "facts kept, or ROUGE-L without facts"),
    Curve("response_length/mean", "Response length", "tokens, mean per rollout"),
    Curve("entropy", "Entropy", "of the policy, per token"),
)
DIAGNOSTICS = (
    Curve("value/explained_variance", "Explained variance", "of the value head"),
    Curve("clip_fraction", "Clip fraction", "share of tokens", True),
    Curve("ratio/max", "Largest ratio", "policy over rollout policy"),
    Curve("kl/k3", "KL to the reference, k3", "nats per token", True),
    Curve("kl/update", "KL of an update", "nats per token", True),
    Curve("grad_norm", "Gradient norm", "before clipping", True),
    Curve("eos_rate", "Ended responses", "share that reached EOS"),
)


def learning_curves(metrics: list[dict[str, Any]], curves: tuple[Curve, ...], kept_step: int) -> list[Plot]:
    """Draw each curve that has at least one point, with a dashed line at the kept checkpoint's step."""
    drawn = [curve for curve in curves if any(curve.key in row for row in metrics)]
    return [Plot(curve.title, curve.note, _draw_curve(metrics, curve, kept_step)) for curve in drawn]


@matplotlib.rc_context(_STYLE)
def toxicity_distributions(before: list[float], after: list[float]) -> list[Plot]:
    """Draw a histogram, and the share of responses above each toxicity, of toxicities in [0, 1]."""
    bins, grid = np.linspace(0, 1, 26).tolist(), np.linspace(0, 1, 201)
    (histogram, bars), (tail, lines) = _axes("toxicity", _HALF), _axes("toxicity", _HALF)
    for values, color, label in ((before, _BEFORE, "before"), (after, _AFTER, "after")):
        weights = np.full(len(values), 1 / len(values))
        bars.hist(values, bins, weights=weights, histtype="stepfilled", color=color, alpha=0.25)
        bars.hist(values, bins, weights=weights, histtype="step", color=color, linewidth=1.5, label=label)
        lines.plot(grid, [np.mean(np.asarray(values) > at) for at in grid], color=color, linewidth=1.6, label=label)
    lines.set_ylim(0, 1)
    bars.legend()
    lines.legend()
    drawn = _svg(histogram, "histogram", "Histogram of toxicity before and after")
    above = _svg(tail, "tail", "Share of responses above each toxicity, before and after")
    plot = Plot("Histogram", "share of responses per bin of 0.04", drawn)
    return [plot, Plot("Tail", "share of responses that score above a toxicity", above)]


@matplotlib.rc_context(_STYLE)
def over_optimisation(series: list[dict[str, Any]], checkpoint: dict[str, Any]) -> list[Plot]:
    """Draw score and judge against the distance, as Gao et al. 2022 do; nothing for a run that did not measure them."""
    if not all("kl" in one for one in series):
        return []
    kept, parted = ([one for one in series if one["step"] == checkpoint[f"{name}_step"]] for name in ("kept", "parted"))
    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    panels, colors = figure.subplots(3, sharex=True), {"score": _BEFORE, "toxicity": _AFTER, "quality": _QUALITY}
    for axes, (key, color) in zip(panels, colors.items(), strict=True):
        errors = [one.get(f"{key}_error", 0.0) for one in series]
        line: dict[str, Any] = {"color": color, "linewidth": 0.8, "marker": "o", "markersize": 3.5}
        axes.errorbar(_distances(series), [one[key] for one in series], errors, **line)
        axes.plot(_distances(kept), [kept[0][key]], "o", markersize=10, fillstyle="none", color=_INK, clip_on=False)
        axes.set_ylabel(key)
        for place in _distances(parted):
            axes.axvline(place, color=_KEPT, linewidth=1.2, linestyle=(0, (4, 3)))
    for one in parted:
        where: dict[str, Any] = {"transform": panels[0].get_xaxis_transform(), "ha": "center", "fontsize": 8}
        panels[0].text(*_distances([one]), 1.02, f"part: step {one['step']}", **where)
    panels[2].set_xlabel("√KL to the start, KL in nats per response")
    drawn = _svg(figure, "over-optimisation", "Score, toxicity and quality against the root of the KL")
    marks = f"ring: kept, step {kept[0]['step']}; dashed: they part"
    note = f"validations in order of step; bars: one standard error; {marks}"
    return [Plot("Score and judge against the distance", note, drawn)]


@matplotlib.rc_context(_STYLE)
def frontier_plot(found: dict[str, Any]) -> Plot:
    """Draw the combinations of a sweep by quality and toxicity: means, seeds, the start, and the frontier by name."""
    figure, axes = _axes(f"quality ({found['measure']})", (6.6, 4.2))
    axes.set_ylabel(f"toxicity by {found['judge']}")
    done = {label: one for label, one in found["combinations"].items() if "kl" in one}
    for label, one in done.items():
        color, place = _AFTER if one["frontier"] else _KEPT, (one["quality"][1], one["toxicity"][1])
        for run in one["runs"]:
            if "error" not in run:
                axes.plot(run["quality"][1], run["toxicity"][1], "o", color=color, markersize=3, alpha=0.6)
        axes.plot(*place, "o", color=color, markersize=8)
        axes.annotate(label if one["frontier"] else "", place, (7, 5), textcoords="offset points", fontsize=8)
    best = sorted((one["quality"][1], one["toxicity"][1]) for one in done.values() if one["frontier"])
    axes.step(*zip(*best, strict=True), where="pre", color=_AFTER, linewidth=1)
    axes.plot(found["start"][1], found["start"][0], "X", color=_BEFORE, markersize=9)
    axes.annotate("start", found["start"][::-1], (7, 5), textcoords="offset points", fontsize=8)
    drawn = _svg(figure, "frontier", "Toxicity against quality of each combination, and their Pareto frontier")
    return Plot("Pareto frontier", "lower right is better; large: mean over seeds, small: seeds", drawn)


def _distances(series: list[dict[str, Any]]) -> list[float]:
    """Return the root of each KL, which an estimate from samples may put below 0."""
    return [max(one["kl"], 0.0) ** 0.5 for one in series]


@matplotlib.rc_context(_STYLE)
def _draw_curve(metrics: list[dict[str, Any]], curve: Curve, kept_step: int) -> Markup:
    figure, axes = _axes("RL step", _THIRD)
    points = [(row["step"], row[curve.key]) for row in metrics if curve.key in row]
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=_AFTER, linewidth=1.6, marker="o" if len(points) < 30 else "", markersize=3.5)
    if errors := [row[f"{curve.key}_error"] for row in metrics if f"{curve.key}_error" in row]:
        low, high = np.subtract(values, errors), np.add(values, errors)
        axes.fill_between(steps, low, high, color=_AFTER, alpha=0.18, linewidth=0)
    axes.axvline(kept_step, color=_KEPT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(kept_step, 1.02, f"kept: step {kept_step}", transform=axes.get_xaxis_transform(), ha="center", fontsize=8)
    if curve.from_zero:
        axes.set_ylim(bottom=0)
    # Shared limits let the reader compare panels by eye even where validation started late or is sparse.
    every = [row["step"] for row in metrics]
    margin = max(1.0, 0.03 * max(every))
    axes.set_xlim(min(every) - margin, max(every) + margin)
    return _svg(figure, curve.key.replace("/", "-"), f"{curve.title}, {curve.note}, by RL step")


def _axes(label: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """Return the figure as inline SVG: scaled by the page, ids unique on it, no date and no outside address."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    body = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    for plain, here in (
        (' id="', f' id="{name}-'), ("url(#", f"url(#{name}-"), ('xlink:href="#', f'href="#{name}-'),
        (_INK, "currentColor"),
    ):  # fmt: skip
        body = body.replace(plain, here)
    width, height = figure.get_size_inches() * 72
    return Markup(f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}">{body}')
