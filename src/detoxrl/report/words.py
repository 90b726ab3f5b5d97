"""How does the report put a result into words and numbers?"""

import re
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

# How the page, the terminal and the card qualify results by the reward's own model.
NOT_INDEPENDENT = "not independent: the reward model itself"
_SYSTEMS = {
    "word_filter": "Word filter",
    "sft_civil": "SFT on civil references",
    "sft_best_of_4": "SFT on best-of-4 responses",
}


@dataclass(frozen=True)
class Metric:
    """What a number of eval.json is called; `better` is 1 where higher is better, -1 where lower is, else 0."""

    label: str
    unit: str
    better: int
    decimals: int = 3


# The metrics of quality by their names in eval.json, in the order in which they are shown.
_QUALITY = {
    "score": Metric("Reward score", "not normalised", 1),
    "facts": Metric("Facts kept", "share of facts", 1),
    "quarrel_reported": Metric("Quarrels reported", "share of responses", 1),
    "rouge_l": Metric("ROUGE-L", "F1, to the civil reference if there is one", 1),
    "chrf": Metric("chrF", "to the civil reference if there is one", 1),
    "similarity": Metric("Similarity to the initial policy", "to another of its responses", 1),
    "entailment": Metric("Entailed by the dialogue", "probability", 1),
    "fluency": Metric("Fluency", "probability", 1),
    "joint": Metric("Civil, similar and fluent (J)", "STA × SIM × FL, mean over responses", 1),
    "copied": Metric("Copied from the dialogue", "share of word 4-grams", 0),
    "distinct_1": Metric("Distinct words", "share of the words in a prompt's samples", 1),
    "distinct_2": Metric("Distinct word pairs", "share of the word pairs in a prompt's samples", 1),
    "length": Metric("Response length in words", "mean", 0, decimals=1),
    "empty_rate": Metric("Empty responses", "share of responses", -1),
    "insult_rate": Metric("Insults known to the reward model", "share of responses with one", -1),
    "insult_rate_unseen": Metric("Insults unknown to the reward model", "share of responses with one", -1),
}


@dataclass(frozen=True)
class Measure:
    """A metric before and after; `difference` is after minus before, with its 95% interval (mean, low, high)."""

    metric: Metric
    before: float
    after: float
    difference: dict[str, float]

    @property
    def label(self) -> str:
        """What the metric is called."""
        return self.metric.label

    @property
    def note(self) -> str:
        """The metric's unit, and which direction is better."""
        direction = {1: "; higher is better", -1: "; lower is better", 0: ""}[self.metric.better]
        return self.metric.unit + direction

    @property
    def decimals(self) -> int:
        """How many decimals a table shows."""
        return self.metric.decimals

    @property
    def direction(self) -> int:
        """1 where the whole interval is above 0, -1 where it is below, 0 where it contains 0."""
        return (self.difference["low"] > 0) - (self.difference["high"] < 0)

    @property
    def verdict(self) -> str:
        """The change in one word; empty if no difference was detected."""
        if self.direction == 0:
            return ""
        if self.metric.better == 0:
            return "more" if self.direction > 0 else "less"
        return "better" if self.direction == self.metric.better else "worse"

    @property
    def claim(self) -> str:
        """The change in words."""
        before = number(self.before, self._exact_decimals)
        after = number(self.after, self._exact_decimals)
        if self.direction == 0:
            return f"{before} before, {after} after"
        return f"{'rose' if self.direction > 0 else 'fell'} from {before} to {after}"

    @property
    def evidence(self) -> str:
        """The difference with its interval."""
        mean, low, high = (signed(self.difference[key], self._exact_decimals) for key in ("mean", "low", "high"))
        return f"difference {mean}, 95% interval {low} to {high}"

    @property
    def _exact_decimals(self) -> int:
        """As many decimals as keep an interval that excludes 0 from being rounded to one that touches it."""
        nearest_to_zero = min(abs(self.difference["low"]), abs(self.difference["high"]))
        decimals = self.decimals
        while self.direction and round(nearest_to_zero, decimals) == 0:
            decimals += 1

        return decimals


def headline(evaluation: dict[str, Any]) -> tuple[str, str]:
    """Return the primary judge's result in words, and its evidence: interval, p-value, prompts and samples."""
    judge = evaluation["primary_judge"]
    result = evaluation["toxicity"][judge]
    difference = result["difference"]
    decimals = 2 if abs(difference["mean"]) >= 0.05 else 3
    toxicity = _toxicity(judge, result, decimals)

    verdict = result["verdict"].capitalize()
    change = toxicity.claim
    if toxicity.direction == 0:
        change = f"was {number(toxicity.before, decimals)} before and {number(toxicity.after, decimals)} after"

    p = "< 0.001" if difference["p"] < 0.001 else f"= {difference['p']:.3f}"
    size = f"{evaluation['n_prompts']} prompts, {evaluation['samples_per_prompt']} samples each"
    # Without any spread between prompts there is no estimate of what could have been detected.
    if toxicity.direction == 0 and difference["detectable"] > 0:
        size += f"; smallest change detectable with 80% power: {number(difference['detectable'])}"

    return f"{verdict}: mean toxicity by {judge} {change}", f"({toxicity.evidence}, p {p}; {size})"


def changes(evaluation: dict[str, Any]) -> tuple[list[Measure], list[Measure]]:
    """Return the measures that changed (their interval excludes 0), and the others; toxicity by the primary judge."""
    primary = evaluation["primary_judge"]
    of_primary = {"toxicity": {primary: evaluation["toxicity"][primary]}, "quality": evaluation["quality"]}
    measures = measured(of_primary).values()

    changed = [measure for measure in measures if measure.direction != 0]
    unchanged = [measure for measure in measures if measure.direction == 0]
    return changed, unchanged


def measured(system: dict[str, Any]) -> dict[str, Measure]:
    """Return the measures of eval.json, or of one of its baselines, by label: toxicity by each judge, then quality."""
    measures = [_toxicity(judge, result) for judge, result in system["toxicity"].items()]
    for name, metric in _QUALITY.items():
        if name in system["quality"]:
            result = system["quality"][name]
            measures.append(Measure(metric, result["before"], result["after"], result["difference"]))

    return {measure.label: measure for measure in measures}


def _toxicity(judge: str, result: dict[str, Any], decimals: int = 3) -> Measure:
    metric = Metric(f"Toxicity by {judge}", "in [0, 1]", -1, decimals)
    return Measure(metric, result["before"]["mean"], result["after"]["mean"], result["difference"])


def quality_name(name: str) -> str:
    """Return what a metric of quality is called; `share with text`, which no table has, is its own name."""
    return _QUALITY[name].label if name in _QUALITY else name


def after_name(evaluation: dict[str, Any]) -> str:
    """Return what "after" is: reinforcement learning, or the name of what was measured where nothing was trained."""
    return str(evaluation["names"].get("after", "reinforcement learning"))


def _system_name(name: str) -> str:
    best_of = re.fullmatch(r"best_of_(\d+)", name)
    if best_of:
        return f"Best-of-{best_of[1]} by the reward"

    return _SYSTEMS.get(name, name)


def systems(evaluation: dict[str, Any]) -> dict[str, dict[str, Measure]]:
    """Return the measures of "after" and of each baseline, by what these are called; "after" comes first."""
    first = evaluation["names"].get("after", after_name(evaluation).capitalize())
    found = {first: measured(evaluation)}
    for name, baseline in evaluation["baselines"].items():
        found[_system_name(name)] = measured(baseline)

    return found


class Baselines(NamedTuple):
    """How "after" compares with the baselines."""

    summary: str
    by_name: dict[str, dict[str, Any]]  # Each comparison as in eval.json, with its verdict in words.


def compare_baselines(evaluation: dict[str, Any]) -> Baselines:
    """Compare "after" with each baseline on the same prompts."""
    after = after_name(evaluation)
    verdicts = {
        "ahead": f"{after} is better",
        "behind": f"better than {after}",
        "level": f"as good as {after}",
        "a trade": "each is better in one of the two",
        "undecided": "too few prompts to tell",
    }

    by_name: dict[str, dict[str, Any]] = {}
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in verdicts}
    for name, baseline in evaluation["baselines"].items():
        comparison = baseline["after"]
        verdict = comparison["verdict"]
        by_name[_system_name(name)] = {
            **comparison,
            "kl_bound": baseline.get("kl_bound"),
            "verdict": verdicts[verdict],
        }
        by_verdict[verdict].append(_system_name(name))

    as_good = by_verdict["behind"] + by_verdict["level"]
    summary = f"No baseline is shown to be as good as {after}."
    if as_good:
        summary = f"At least as good as {after}: {', '.join(as_good)}."
    if by_verdict["undecided"]:
        summary += f" Too few prompts to tell: {', '.join(by_verdict['undecided'])}."

    return Baselines(summary, by_name)


def data_account(rows: dict[str, Any]) -> dict[str, Any]:
    """Return rows.json with "counts", the rows of each outcome by split, used ones first, and "sums" by split."""
    splits = list(rows["splits"].values())
    outcomes = sorted(dict.fromkeys(chain(*splits)), key=lambda outcome: not outcome.startswith("used"))
    counts = {outcome: [split.get(outcome, 0) for split in splits] for outcome in outcomes}
    sums = [sum(split.values()) for split in splits]

    return {**rows, "counts": counts, "sums": sums}


def setting_changes(evaluation: dict[str, Any]) -> list[str]:
    """Return the settings that changed when the run resumed, one line for each time: `At step 40: rl.steps 40 → 80`."""
    lines = []
    for record in evaluation.get("changed_on_its_way", []):
        pairs = [f"{name} {before} → {now}" for name, (before, now) in record["changes"].items()]
        when = f"At step {record['step']}" if record["stage"] == "train" else f"Before {record['stage']} resumed"
        lines.append(f"{when}: {', '.join(pairs)}")

    return lines


def number(value: float | None, decimals: int = 3) -> str:
    """Return the rounded value with a true minus sign; a dash for no value."""
    if value is None:
        return "—"
    rounded = round(value, decimals) + 0.0  # adding 0.0 turns -0.0 into 0.0
    return f"{rounded:.{decimals}f}".replace("-", "−")


def signed(value: float, decimals: int = 3) -> str:
    """Return the rounded value with its sign, also a plus; zero has none."""
    plus = "+" if round(value, decimals) > 0 else ""
    return plus + number(value, decimals)


def percent(share: float | None, sign: bool = False) -> str:
    """Return a share as a whole percentage; a dash for no value."""
    if share is None:
        return "—"
    return f"{signed(100 * share, 0) if sign else number(100 * share, 0)}%"


def duration(seconds: float) -> str:
    """Return seconds as `12.3 s` or `4 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
