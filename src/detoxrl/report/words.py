"""How does the report put a result into words and numbers?"""

import math
import re
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from detoxrl.config.judges import PERSPECTIVE_SCORES
from detoxrl.config.terms import TERM_KINDS
from detoxrl.evaluation.sharpening import SHARPENED
from detoxrl.runtime.run_folder import INITIAL_KEPT, REWARD_JUDGE, SHARE_WITH_TEXT

# How the page, the terminal and the card qualify results by the reward's own model.
NOT_INDEPENDENT = "not independent: the reward model itself"
_SYSTEMS = {
    "word_filter": "Word filter",
    "sft_civil": "SFT on civil references",
    "sft_best_of_4": "SFT on best-of-4 responses",
    "dpo_best_and_worst": "DPO on best and worst of 4",
    "copy": "Copy of the source",
    "human": "Rewritten by people",
}


@dataclass(frozen=True)
class Metric:
    """What a number of eval.json is called; `better` is 1 where higher is better, -1 where lower is, else 0.

    With `is_exponential`, what is shown is exp of the number, and a change is the ratio of after to before.
    """

    label: str
    unit: str
    better: int
    decimals: int = 3
    is_exponential: bool = False


# The metrics of quality by their names in eval.json, in the order in which they are shown.
_QUALITY = {
    "score": Metric("Reward score", "not normalised", 1),
    "facts": Metric("Facts kept", "share of facts", 1),
    "quarrel_reported": Metric("Quarrels reported", "share of responses", 1),
    "rouge_l": Metric("ROUGE-L", "F1, to the civil reference if there is one", 1),
    "chrf": Metric("chrF", "to the civil reference if there is one", 1),
    "similarity": Metric("Similarity to the initial policy", "to another of its responses", 1),
    "source_similarity": Metric("Similarity to the source", "of the response to what it rewrites", 1),
    "entailment": Metric("Entailed by the prompt", "probability", 1),
    "fluency": Metric("Fluency", "probability", 1),
    "joint": Metric("Civil, similar and fluent (J)", "STA × SIM × FL, mean over responses", 1),
    "copied": Metric("Copied from the prompt", "share of word 4-grams", 0),
    "distinct_1": Metric("Distinct words", "share of the words in a prompt's samples", 1),
    "distinct_2": Metric("Distinct word pairs", "share of the word pairs in a prompt's samples", 1),
    "distinct_3": Metric("Distinct word triples", "share of the word triples in a prompt's samples", 1),
    "entropy": Metric("Entropy", "nats per token, at the temperature of sampling", 0, decimals=2),
    "nll": Metric("Perplexity by the initial policy", "per token; the change is a ratio", 0, 2, is_exponential=True),
    "nll_by_model": Metric(
        "Perplexity by another model", "per token; the change is a ratio", 0, 2, is_exponential=True
    ),
    "length": Metric("Response length in words", "mean", 0, decimals=1),
    "empty_rate": Metric("Empty responses", "share of responses", -1),
    "refusal_rate": Metric("Refusals", "share of responses that begin as a refusal, by a list of phrases", -1),
    "insult_rate": Metric("Insults known to the reward model", "share of responses with one", -1),
    "insult_rate_unseen": Metric("Insults unknown to the reward model", "share of responses with one", -1),
}


# What is reported of parts of the prompts, as RealToxicityPrompts does, by each judge.
_EXTREMES = {
    "expected_max_toxicity": Metric("Expected maximum toxicity", "mean over prompts of the worst sample", -1),
    "toxicity_probability": Metric("Toxicity probability", "share of prompts with a sample at 0.5 or above", -1),
}
# What is reported of the same parts beside toxicity.
_BY_PROMPT = {
    **{name: _QUALITY[name] for name in ("nll", "entropy", "distinct_1", "distinct_2", "distinct_3")},
    "refusal_rate": _QUALITY["refusal_rate"],
}


# Measures that only validations have.
_OF_VALIDATIONS = {
    SHARE_WITH_TEXT: "share with text",
    "corpus_distinct_2": "distinct word pairs of all responses",
    "source_chrf": "chrF to the source",
}
# The metrics that say whether a response says the right thing. The first one that was measured is "quality".
_FAITHFULNESS = ("facts", "rouge_l")
# The metrics that the terminal shows beside quality; the report has all.
_ESSENTIAL = ("score", "entailment", "fluency", "joint", "entropy", "nll", "length", "empty_rate")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Measure:
    """A metric before and after; `difference` is after minus before, with its 95% interval (mean, low, high).

    Without a comparison, where training kept the initial policy, "after" is "before" and `difference` is None.
    """

    metric: Metric
    before: float
    after: float
    difference: dict[str, float] | None

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
        """1 where the whole interval is above 0, -1 where it is below, 0 where it contains 0 or there is none."""
        if self.difference is None:
            return 0
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
        before, after = self.values
        if self.direction == 0:
            return f"{before} before, {after} after"
        return f"{'rose' if self.direction > 0 else 'fell'} from {before} to {after}"

    @property
    def values(self) -> tuple[str, str]:
        """The metric before and after, rounded."""
        return self._values(self._exact_decimals)

    @property
    def evidence(self) -> str:
        """The change with its interval; empty without a comparison."""
        if self.difference is None:
            return ""
        change = self._change("mean", self._exact_decimals)
        noun = "ratio" if self.metric.is_exponential else "difference"
        return f"{noun} {change}, 95% interval {self.interval}"

    @property
    def interval(self) -> str:
        """The two ends of the change's 95% interval; empty without a comparison."""
        return self._interval(self._exact_decimals)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Before, after, the change and its interval, as a table shows them; the last two may be empty."""
        change = "" if self.difference is None else self._change("mean", self.decimals)
        return *self._values(self.decimals), change, self._interval(self.decimals)

    def _values(self, decimals: int) -> tuple[str, str]:
        before, after = self.before, self.after
        if self.metric.is_exponential:
            before, after = math.exp(before), math.exp(after)
        return number(before, decimals), number(after, decimals)

    def _interval(self, decimals: int) -> str:
        if self.difference is None:
            return ""
        return f"{self._change('low', decimals)} to {self._change('high', decimals)}"

    def _change(self, part: str, decimals: int) -> str:
        """Return a part of the difference in words; of an exponential metric, the ratio that it stands for."""
        assert self.difference is not None
        change = self.difference[part]
        return f"×{number(math.exp(change), decimals)}" if self.metric.is_exponential else signed(change, decimals)

    @property
    def _exact_decimals(self) -> int:
        """As many decimals as keep an interval that excludes no change from being rounded to one that touches it."""
        decimals = self.decimals
        if self.difference is None:
            return decimals

        nearest = min(self.difference["low"], self.difference["high"], key=abs)
        distance = math.expm1(nearest) if self.metric.is_exponential else nearest
        while self.direction and round(distance, decimals) == 0:
            decimals += 1

        return decimals


def kept_initial(evaluation: dict[str, Any]) -> bool:
    """Return whether training kept the initial policy, so that there is no "after" to compare with."""
    return bool(evaluation["toxicity"][evaluation["primary_judge"]]["verdict"] == INITIAL_KEPT)


def kept_reason(evaluation: dict[str, Any]) -> str:
    """Return in words why training kept the initial policy."""
    loss = "losing quality" if main_quality(evaluation) else "writing more empty responses"
    return f"no checkpoint was less toxic without {loss}"


def main_quality(evaluation: dict[str, Any]) -> str | None:
    """Return the metric that "quality" means in this evaluation; None if the data allows none."""
    usual = next((name for name in _FAITHFULNESS if name in evaluation["quality"]), None)
    name = evaluation.get("quality_by", usual)  # An early version did not store it.
    return name if name in evaluation["quality"] else None


def sides(evaluation: dict[str, Any]) -> dict[str, str]:
    """Return the sides of the comparison with their labels; one where training kept the initial policy."""
    if kept_initial(evaluation):
        return {"before": "initial policy"}
    return {"before": "before", "after": "after"}


def validation_quality_name(measure: str | None) -> str:
    """Return what the quality of validations is, by its measure in checkpoint.json; None if that does not say."""
    if measure is None:
        return "quality"
    return _OF_VALIDATIONS.get(measure) or _QUALITY[measure].label


def shown_quality(evaluation: dict[str, Any]) -> str | None:
    """Return the metric that best says whether responses say the right thing; None if none was measured.

    Entailment is read only in the evaluation, so unlike `main_quality` it never selected a checkpoint.
    """
    entailment = "entailment" if "entailment" in evaluation["quality"] else None
    return main_quality(evaluation) or entailment


def prompts_and_samples(evaluation: dict[str, Any], prompts: str = "prompts") -> str:
    """Return how much was measured: `400 prompts, 4 samples each`."""
    samples = evaluation["samples_per_prompt"]
    return f"{evaluation['n_prompts']} {prompts}, {samples} sample{'s' if samples > 1 else ''} each"


def headline(evaluation: dict[str, Any]) -> tuple[str, str]:
    """Return the primary judge's result in words, and its evidence: interval, p-value, prompts and samples."""
    judge = evaluation["primary_judge"]
    result = evaluation["toxicity"][judge]
    size = prompts_and_samples(evaluation)
    if kept_initial(evaluation):
        level = f"(mean toxicity by {judge} is {number(result['before']['mean'])}; {size})"
        return f"{INITIAL_KEPT.capitalize()}: {kept_reason(evaluation)}", level

    difference = result["difference"]
    decimals = 2 if abs(difference["mean"]) >= 0.05 else 3
    toxicity = _toxicity(judge, result, decimals)

    verdict = result["verdict"].capitalize()
    change = toxicity.claim
    if toxicity.direction == 0:
        change = f"was {number(toxicity.before, decimals)} before and {number(toxicity.after, decimals)} after"

    p = "< 0.001" if difference["p"] < 0.001 else f"= {difference['p']:.3f}"
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


def by_prompt(evaluation: dict[str, Any]) -> dict[str, list[Measure]]:
    """Return the measures of toxic, stressed and other prompts, by the title of the part; empty without such parts."""
    titles = {f"{part['n']} {name}": part for name, part in evaluation.get("by_prompt", {}).items()}
    return {title: _measures_of_part(evaluation, part) for title, part in titles.items()}


def with_top_p(evaluation: dict[str, Any]) -> dict[str, list[Measure]]:
    """Return the same where tokens are drawn with evaluation.top_p, all prompts first; empty without it."""
    sampled = evaluation.get("top_p")  # Earlier versions had none.
    if sampled is None:
        return {}
    parts = {f"{part['n']} {name}": part for name, part in sampled["by_prompt"].items()}
    titles = {f"all {evaluation['n_prompts']} prompts": sampled, **parts}
    return {title: _measures_of_part(evaluation, part) for title, part in titles.items()}


def _measures_of_part(evaluation: dict[str, Any], part: dict[str, Any]) -> list[Measure]:
    """Return the measures of some prompts: toxicity and its extremes by each judge but the reward's, and quality."""
    primary = evaluation["primary_judge"]
    judges = [judge for judge in part["toxicity"] if judge != REWARD_JUDGE]
    shown: dict[str, Metric] = {}
    for judge in judges:
        suffix = "" if judge == primary else f"/{judge}"
        for name, metric in _EXTREMES.items():
            shown[f"{name}{suffix}"] = replace(metric, label=f"{metric.label} by {judge}")

    quality = main_quality(evaluation)
    if quality is not None:
        shown[quality] = _QUALITY[quality]
    shown |= _BY_PROMPT

    measures = [_toxicity(judge, part["toxicity"][judge]) for judge in judges]
    for name, metric in shown.items():
        if name in part["quality"]:
            result = part["quality"][name]
            measures.append(Measure(metric, result["before"], result["after"], result["difference"]))
    return measures


def toxicity_by_prompt(evaluation: dict[str, Any]) -> dict[str, Measure]:
    """Return toxicity by the primary judge of each part of the prompts, by the part's title; empty without parts."""
    judge = evaluation["primary_judge"]
    parts = {}
    for name, part in evaluation.get("by_prompt", {}).items():
        parts[f"{part['n']} {name}"] = _toxicity(judge, part["toxicity"][judge])
    return parts


def reward_terms(evaluation: dict[str, Any]) -> list[Measure]:
    """Return the mean raw value of each term of a reward that has several."""
    measures = []
    for term in evaluation.get("reward_terms", []):
        kind = TERM_KINDS[term["kind"]]
        gate = "" if term["gate"] is None else f", gate {number(term['gate'])}"
        metric = Metric(term["name"], f"{kind.meaning}; weight {term['weight']:g}{gate}", kind.better)
        result = evaluation["quality"][f"score/{term['name']}"]
        measures.append(Measure(metric, result["before"], result["after"], result["difference"]))
    return measures


def perspective_scores(evaluation: dict[str, Any]) -> list[Measure]:
    """Return the mean of each score of perspective-minilm; none where it was not a judge."""
    measures = []
    for name in PERSPECTIVE_SCORES:
        result = evaluation["quality"].get(f"perspective/{name}")
        if result is not None:
            metric = Metric(name.replace("_", " ").capitalize(), "in [0, 1]", -1)
            measures.append(Measure(metric, result["before"], result["after"], result["difference"]))
    return measures


def joint_scale(evaluation: dict[str, Any]) -> str:
    """Return where J lies between copying the source and what people wrote; empty where that was not measured."""
    scale = evaluation.get("joint_scale")
    if not scale:
        return ""
    after = f"{after_name(evaluation)} at {percent(scale['after'])}"
    return (
        f"J of copying the source is {number(scale['copy'])}, and of what people wrote {number(scale['human'])}. "
        f"On the scale between them the initial policy is at {percent(scale['before'])}, and {after}."
    )


def primary_toxicity(evaluation: dict[str, Any]) -> Measure:
    """Return toxicity by the primary judge."""
    judge = evaluation["primary_judge"]
    return _toxicity(judge, evaluation["toxicity"][judge])


def _toxicity(judge: str, result: dict[str, Any], decimals: int = 3) -> Measure:
    metric = Metric(f"Toxicity by {judge}", "in [0, 1]", -1, decimals)
    return Measure(metric, result["before"]["mean"], result["after"]["mean"], result["difference"])


def essential(evaluation: dict[str, Any]) -> dict[str, Measure]:
    """Return the few measures that the terminal shows, by label: toxicity by each judge, quality, and its like."""
    shown = {*_ESSENTIAL, main_quality(evaluation)}
    quality = {name: result for name, result in evaluation["quality"].items() if name in shown}
    return measured({"toxicity": evaluation["toxicity"], "quality": quality})


def measure_of(evaluation: dict[str, Any], name: str) -> Measure | None:
    """Return a measure of quality by its name in eval.json; None if it was not measured."""
    if name not in evaluation["quality"]:
        return None
    (measure,) = measured({"toxicity": {}, "quality": {name: evaluation["quality"][name]}}).values()
    return measure


def quality_name(name: str) -> str:
    """Return what a metric of quality is called."""
    return NOT_MEASURED if name == SHARE_WITH_TEXT else _QUALITY[name].label


def after_name(evaluation: dict[str, Any]) -> str:
    """Return what "after" is: reinforcement learning, the initial policy, or the name of what was measured."""
    default = "the initial policy" if kept_initial(evaluation) else "reinforcement learning"
    return str(evaluation["names"].get("after", default))


def _system_name(name: str, evaluation: dict[str, Any]) -> str:
    if name == SHARPENED:
        return f"Initial policy at temperature {number(evaluation['sharpening']['temperature'], 2)}"

    best_of = re.fullmatch(r"best_of_(\d+)", name)
    if best_of:
        return f"Best-of-{best_of[1]} by the reward"

    return _SYSTEMS.get(name, name)


def systems(evaluation: dict[str, Any]) -> dict[str, dict[str, Measure]]:
    """Return the measures of "after" and of each baseline, by what these are called; "after" comes first."""
    first = evaluation["names"].get("after", after_name(evaluation).capitalize())
    systems = {first: measured(evaluation)}
    for name, baseline in evaluation["baselines"].items():
        systems[_system_name(name, evaluation)] = measured(baseline)

    return systems


class Baselines(NamedTuple):
    """How "after" compares with the baselines."""

    summary: str
    sharpening: str  # What the control for sharpening says, or why there is none; empty for an earlier version's run.
    may_be_sharpening: bool  # The control does as well as "after", which gained something.
    at_least_as_good: list[str]  # The baselines that do as well as "after" or better.
    are_all_worse: bool
    by_name: dict[str, dict[str, Any]]  # Each comparison as in eval.json, with its verdict in words.


def compare_baselines(evaluation: dict[str, Any]) -> Baselines:
    """Compare "after" with each baseline on the same prompts."""
    after = after_name(evaluation)
    verdicts = {
        "ahead": f"{after} is better",
        "behind": f"better than {after}",
        "level": f"as good as {after}",
        "a trade": "each is better in one of the two",
        "undecided": "no detectable difference" if kept_initial(evaluation) else "too few prompts to tell",
    }

    by_name: dict[str, dict[str, Any]] = {}
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in verdicts}
    for name, baseline in evaluation["baselines"].items():
        comparison = baseline["after"]
        verdict = comparison["verdict"]
        system = _system_name(name, evaluation)
        by_name[system] = {
            **comparison,
            "kl_bound": baseline.get("kl_bound"),
            "outcome": verdict,
            "verdict": verdicts[verdict],
        }
        by_verdict[verdict].append(system)

    at_least_as_good = by_verdict["behind"] + by_verdict["level"]
    if kept_initial(evaluation):
        summary = _baselines_beside_initial(at_least_as_good)
    else:
        summary = _baselines_beside(after, at_least_as_good, by_verdict["undecided"])
    are_all_worse = len(by_verdict["ahead"]) == len(by_name) > 0
    may_be_sharpening = _may_be_sharpening(evaluation)
    sharpening = _sharpening(evaluation, may_be_sharpening)
    return Baselines(summary, sharpening, may_be_sharpening, at_least_as_good, are_all_worse, by_name)


def _may_be_sharpening(evaluation: dict[str, Any]) -> bool:
    """Return whether "after" is less toxic, and the control for sharpening does at least as well."""
    if SHARPENED not in evaluation["baselines"] or primary_toxicity(evaluation).direction >= 0:
        return False
    return evaluation["baselines"][SHARPENED]["after"]["verdict"] in ("behind", "level")


def _sharpening(evaluation: dict[str, Any], may_be_sharpening: bool) -> str:
    result = evaluation.get("sharpening")  # Earlier versions had no such control.
    if result is None:
        return ""
    if result["temperature"] is None:
        return f"There is no control for sharpening: {result['left_out']}."

    temperature = number(result["temperature"], 2)
    trained = evaluation["names"].get("after", "the trained policy")
    sentence = f"At temperature {temperature} the initial policy has about the entropy of {trained}."
    if may_be_sharpening:
        sentence += " It does as well there, so the lower toxicity may be sharpening alone."
    return sentence


def _baselines_beside(after: str, at_least_as_good: list[str], undecided: list[str]) -> str:
    summary = f"No baseline is shown to be as good as {after}."
    if at_least_as_good:
        summary = f"At least as good as {after}: {', '.join(at_least_as_good)}."
    if undecided:
        summary += f" Too few prompts to tell: {', '.join(undecided)}."
    return summary


def _baselines_beside_initial(better: list[str]) -> str:
    # The initial policy has no gain, so no baseline is level with it: each of these is better.
    if not better:
        return "No baseline is shown to be better than the initial policy."
    return f"Better than the initial policy: {', '.join(better)}."


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
