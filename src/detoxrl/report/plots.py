"""How do curves and distributions become SVG that fits light and dark pages?"""

import io
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detoxrl.report.words import quality_name
from detoxrl.runtime.run_folder import SHARE_WITH_TEXT

# Figures are drawn in this colour, which is then replaced by the page's own text colour, light or dark.
_INK = "#010203"
_BEFORE = "#d9822b"
_AFTER = "#2f8fb8"
_MARK = "#8f8f8f"
_QUALITY = "#3f9a77"
_DASHES = (0, (4, 3))

# Width and height in inches; the page shows three or two of them side by side.
_THIRD = (3.5, 2.0)
_HALF = (5.4, 2.4)

_PANELS_IN_A_ROW = 4

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small and searchable
    "svg.hashsalt": "detoxrl",  # so that equal runs give equal files
    "font.size": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


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


DIAGNOSTICS = (
    Curve("value/explained_variance", "Explained variance", "of the returns, by the value head"),
    Curve("groups/score_std", "Spread within groups", "standard deviation of a prompt's scores, mean", True),
    Curve("groups/zero_variance", "Groups without a difference", "share of prompts"),
    Curve("clip_fraction", "Clip fraction", "share of tokens", True),
    Curve("ratio/max", "Largest ratio", "probability by the new policy over that by the sampling policy"),
    Curve("kl/k3", "KL to the reference, k3", "nats per token", True),
    Curve("kl/update", "KL of the update", "nats per token", True),
    Curve("grad_norm", "Gradient norm", "before clipping", True),
    Curve("eos_rate", "Finished responses", "share that ended with EOS"),
)


def training_curves(quality: str) -> tuple[Curve, ...]:
    """Return the curves that show how training went; `quality` names the quality of validations."""
    return (
        Curve("score/mean", "Reward score", "raw, mean over the step's responses"),
        Curve("validation/toxicity", "Validation toxicity", "primary judge, mean; band: one standard error", True),
        Curve("kl/reference", "KL to the reference", "nats per response", True),
        Curve("validation/quality", f"Validation {quality}", "mean over the validation prompts"),
        Curve("response_length/mean", "Response length", "tokens, mean over the step's responses"),
        Curve("entropy", "Entropy of the policy", "nats per token"),
    )


def learning_curves(metrics: list[dict[str, Any]], curves: tuple[Curve, ...], best_step: int) -> list[Plot]:
    """Draw each curve that has at least one point, with a dashed line at the step of the policy that was kept."""
    drawn = [curve for curve in curves if any(curve.key in row for row in metrics)]
    return [Plot(curve.title, curve.note, _draw_curve(metrics, curve, best_step)) for curve in drawn]


@matplotlib.rc_context(_STYLE)
def toxicity_distributions(toxicities: dict[str, list[float]]) -> list[Plot]:
    """Draw the histogram of toxicities in [0, 1] by label, and the share of responses above each toxicity."""
    histogram, bars = _axes("toxicity", _HALF)
    tail, lines = _axes("toxicity", _HALF)
    bins = np.linspace(0, 1, 26).tolist()
    grid = np.linspace(0, 1, 201)

    for (label, values), color in zip(toxicities.items(), (_BEFORE, _AFTER), strict=False):
        weights = np.full(len(values), 1 / len(values))
        bars.hist(values, bins, weights=weights, histtype="stepfilled", color=color, alpha=0.25)
        bars.hist(values, bins, weights=weights, histtype="step", color=color, linewidth=1.5, label=label)

        share_above = [np.mean(np.asarray(values) > toxicity) for toxicity in grid]
        lines.plot(grid, share_above, color=color, linewidth=1.6, label=label)

    lines.set_ylim(0, 1)
    bars.legend()
    lines.legend()

    labels = " and ".join(toxicities)
    histogram_svg = _svg(histogram, "histogram", f"Histogram of toxicity: {labels}")
    tail_svg = _svg(tail, "tail", f"Share of responses above each toxicity: {labels}")
    return [
        Plot("Histogram", "share of responses per bin of width 0.04", histogram_svg),
        Plot("Tail", "share of responses with a higher toxicity", tail_svg),
    ]


@matplotlib.rc_context(_STYLE)
def over_optimisation(validations: list[dict[str, Any]], checkpoint: dict[str, Any], quality: str) -> list[Plot]:
    """Draw score, toxicity and quality against the square root of the KL (Gao et al. 2022).

    `quality` names the quality of validations. Returns nothing for a run whose validations did not measure the KL.
    """
    if not all("kl" in validation for validation in validations):
        return []

    by_step = {validation["step"]: validation for validation in validations}
    best = by_step[checkpoint["kept_step"]]
    diverging = by_step.get(checkpoint["parted_step"])

    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    drawn = {"score": ("score", _BEFORE), "toxicity": ("toxicity", _AFTER), "quality": (quality, _QUALITY)}
    for axes, (key, (label, color)) in zip(panels, drawn.items(), strict=True):
        _draw_validations(axes, validations, key, color)
        axes.set_ylabel(label)
        axes.plot(_root_kl(best), [best[key]], "o", markersize=10, fillstyle="none", color=_INK, clip_on=False)
        if diverging:
            axes.axvline(_root_kl(diverging), color=_MARK, linewidth=1.2, linestyle=_DASHES)

    if diverging:
        _label_above(panels[0], _root_kl(diverging), f"divergence: step {diverging['step']}")
    panels[2].set_xlabel("√KL to the initial policy, KL in nats per response")

    svg = _svg(figure, "over-optimisation", "Reward score, toxicity and quality against the square root of the KL")
    ring = f"best checkpoint, step {best['step']}" if best["step"] else "the initial policy, which was kept"
    note = f"a point per validation, joined in order; bars: one standard error; ring: {ring}"
    if diverging:
        note += "; dashed: divergence"
    return [Plot("Reward score, toxicity and quality by distance from the initial policy", note, svg)]


def _draw_validations(axes: Axes, validations: list[dict[str, Any]], key: str, color: str) -> None:
    """Draw one measure of the validations, with its standard errors where they are known."""
    distances = [_root_kl(validation) for validation in validations]
    values = [validation[key] for validation in validations]
    errors = [validation.get(f"{key}_error", 0.0) for validation in validations]
    axes.errorbar(distances, values, errors, color=color, linewidth=0.8, marker="o", markersize=3.5)


def _root_kl(validation: dict[str, Any]) -> float:
    """Return the square root of the KL, whose estimate from samples may be below 0."""
    return float(max(validation["kl"], 0.0) ** 0.5)


@matplotlib.rc_context(_STYLE)
def frontier_plot(sweep: dict[str, Any]) -> Plot:
    """Draw a sweep's combinations by quality and toxicity: means, seeds, the initial policy and the Pareto frontier."""
    quality_label = f"quality ({quality_name(sweep['measure'])})"
    if sweep["measure"] == SHARE_WITH_TEXT:
        quality_label = f"{SHARE_WITH_TEXT} (quality was not measured)"
    figure, axes = _axes(quality_label, (6.6, 4.2))
    axes.set_ylabel(f"toxicity by {sweep['judge']}")

    frontier = []
    for label, combination in sweep["combinations"].items():
        if "kl" not in combination:  # all its runs failed
            continue

        color = _AFTER if combination["frontier"] else _MARK
        for run in combination["runs"]:
            if "error" not in run:
                axes.plot(run["quality"][1], run["toxicity"][1], "o", color=color, markersize=3, alpha=0.6)

        mean = (combination["quality"][1], combination["toxicity"][1])
        axes.plot(*mean, "o", color=color, markersize=8)
        _label_beside(axes, mean, label if combination["frontier"] else "")
        if combination["frontier"]:
            frontier.append(mean)

    qualities, toxicities = zip(*sorted(frontier), strict=True)
    axes.step(qualities, toxicities, where="pre", color=_AFTER, linewidth=1)

    toxicity, quality = sweep["start"]
    axes.plot(quality, toxicity, "X", color=_BEFORE, markersize=9)
    _label_beside(axes, (quality, toxicity), "initial policy")

    svg = _svg(figure, "frontier", "Toxicity against quality of each combination, and the Pareto frontier")
    return Plot("Pareto frontier", "lower right is better; large points: means over seeds; small points: seeds", svg)


@matplotlib.rc_context(_STYLE)
def reliability_plot(bins: dict[str, list[dict[str, Any]]]) -> Plot:
    """Draw, in a panel for each label, the mean label against the mean probability of the bins of its examples."""
    columns = min(len(bins), _PANELS_IN_A_ROW)
    rows = -(-len(bins) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(bins) :]:
        axes.set_visible(False)

    for axes, (label, points) in zip(panels, bins.items(), strict=False):
        probabilities = [point["mean_probability"] for point in points]
        labels = [point["mean_label"] for point in points]
        examples = np.array([point["examples"] for point in points])

        axes.plot([0, 1], [0, 1], color=_MARK, linewidth=0.8, linestyle=_DASHES)
        axes.plot(probabilities, labels, color=_AFTER, linewidth=0.8)
        axes.scatter(probabilities, labels, 12 + 80 * examples / examples.sum(), color=_AFTER)
        axes.set_title(label, fontsize=9, parse_math=False)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
    figure.supxlabel("mean probability", fontsize=9)
    figure.supylabel("mean label", fontsize=9)

    svg = _svg(figure, "reliability", "Mean label against mean probability of held-out examples, by label")
    note = "a point per tenth of the probabilities, larger for more examples; on the dashed line a classifier is right"
    return Plot("Reliability", note, svg)


def standalone(svg: Markup) -> str:
    """Return a drawing as the content of a file of its own, in a grey that shows on light and dark pages."""
    return str(svg).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" color="#7f7f7f"', 1) + "\n"


@matplotlib.rc_context(_STYLE)
def _draw_curve(metrics: list[dict[str, Any]], curve: Curve, best_step: int) -> Markup:
    figure, axes = _axes("RL step", _THIRD)

    points = [row for row in metrics if curve.key in row]
    steps = [row["step"] for row in points]
    values = [row[curve.key] for row in points]
    axes.plot(steps, values, color=_AFTER, linewidth=1.6, marker="o" if len(points) < 30 else "", markersize=3.5)

    error = f"{curve.key}_error"
    errors = [row[error] for row in points if error in row]
    if errors:
        low, high = np.subtract(values, errors), np.add(values, errors)
        axes.fill_between(steps, low, high, color=_AFTER, alpha=0.18, linewidth=0)

    axes.axvline(best_step, color=_MARK, linewidth=1.2, linestyle=_DASHES)
    _label_above(axes, best_step, f"best: step {best_step}" if best_step else "initial policy kept")
    if curve.from_zero:
        axes.set_ylim(bottom=0)

    # All panels have the same limits, so that they can be compared by eye where validations are sparse.
    all_steps = [row["step"] for row in metrics]
    margin = max(1.0, 0.03 * max(all_steps))
    axes.set_xlim(min(all_steps) - margin, max(all_steps) + margin)

    return _svg(figure, curve.key.replace("/", "-"), f"{curve.title}, {curve.note}, by RL step")


def _axes(label: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(label)
    return figure, axes


def _label_above(axes: Axes, x: float, text: str) -> None:
    """Write above the plot, at `x` on its horizontal axis."""
    axes.text(x, 1.02, text, transform=axes.get_xaxis_transform(), ha="center", fontsize=8)


def _label_beside(axes: Axes, point: tuple[float, float], text: str) -> None:
    axes.annotate(text, point, (7, 5), textcoords="offset points", fontsize=8)


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """Return the figure as inline SVG, scaled by the page; ids are unique on the page, and nothing outside is named."""
    buffer = io.StringIO()
    no_metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    body = buffer.getvalue().partition("<svg")[2].partition(">")[2]

    body = body.replace(' id="', f' id="{name}-')
    body = body.replace("url(#", f"url(#{name}-")
    body = body.replace('xlink:href="#', f'href="#{name}-')
    body = body.replace(_INK, "currentColor")

    width, height = figure.get_size_inches() * 72
    return Markup(f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}">{body}')
