"""How does the report put a result into words and numbers?"""

import re
from itertools import chain
from typing import Any, NamedTuple

# Name in eval.json: label, what it is, decimals, 1 where more is better, -1 where less is.
_QUALITY = {
    "score": ("Reward score", "raw", 3, 1),
    "facts": ("Facts kept", "share", 3, 1),
    "quarrel_reported": ("Quarrels reported", "share", 3, 1),
    "rouge_l": ("ROUGE-L", "to the civil reference where there is one", 3, 1),
    "chrf": ("chrF", "to the civil reference where there is one", 3, 1),
    "similarity": ("Similarity to the start", "to another response of the start", 3, 1),
    "entailment": ("Entailed by the dialogue", "probability", 3, 1),
    "fluency": ("Fluency", "probability", 3, 1),
    "joint": ("Civil, similar and fluent (J)", "STA x SIM x FL", 3, 1),
    "copied": ("Copied from the dialogue", "share of 4-word runs", 3, 0),
    "distinct_1": ("Distinct words", "of a prompt's samples", 3, 1),
    "distinct_2": ("Distinct word pairs", "of a prompt's samples", 3, 1),
    "length": ("Response length in words", "mean", 1, 0),
    "empty_rate": ("Empty responses", "share", 3, -1),
    "insult_rate": ("Insults the reward model knows", "share of responses", 3, -1),
    "insult_rate_unseen": ("Insults the reward model never saw", "share of responses", 3, -1),
}
_SYSTEMS = {
    "word_filter": "Word filter",
    "sft_civil": "Supervised on civil references",
    "sft_best_of_4": "Supervised on the best of 4",
}


class Measure(NamedTuple):
    """One number before and after; the difference is after minus before with its 95 % interval."""

    label: str
    what: str
    decimals: int
    better: int
    before: float
    after: float
    difference: dict[str, float]

    @property
    def note(self) -> str:
        """What the number is, and which direction is good."""
        return self.what + {1: "; higher is better", -1: "; lower is better", 0: ""}[self.better]

    @property
    def direction(self) -> int:
        """1 where the interval lies above 0, -1 where it lies below, 0 where it holds 0."""
        return (self.difference["low"] > 0) - (self.difference["high"] < 0)

    @property
    def verdict(self) -> str:
        """What the change is worth, in a word; empty without a detectable difference."""
        if self.direction and self.better:
            return "better" if self.direction == self.better else "worse"
        return {1: "more", -1: "less", 0: ""}[self.direction]

    @property
    def claim(self) -> str:
        """The change in words."""
        words = {1: "rose from {} to {}", -1: "fell from {} to {}", 0: "{} before, {} after"}[self.direction]
        return words.format(*(number(value, self._decimals) for value in (self.before, self.after)))

    @property
    def evidence(self) -> str:
        """The difference with its interval."""
        mean, low, high = (signed(self.difference[key], self._decimals) for key in ("mean", "low", "high"))
        return f"difference {mean}, 95 % interval {low} to {high}"

    @property
    def _decimals(self) -> int:
        # An interval that excludes 0 must not seem to touch it: as many decimals as its nearer end needs.
        nearer = min(abs(self.difference["low"]), abs(self.difference["high"]))
        decimals = self.decimals
        while self.direction and round(nearer, decimals) == 0:
            decimals += 1
        return decimals


def headline(evaluation: dict[str, Any]) -> tuple[str, str]:
    """Say in words what the primary judge found, and what it rests on: interval, prompts and samples."""
    judge = evaluation["primary_judge"]
    result = evaluation["toxicity"][judge]
    found = _by_judge(judge, result)
    decimals = 2 if abs(found.difference["mean"]) >= 0.05 else 3
    found = found._replace(decimals=decimals)
    change = found.claim if found.direction else "was " + found.claim.replace(",", " and")
    least = number(found.difference["detectable"], max(decimals, 3))
    told = f"; a change of {least} would have been found in 4 of 5 such measurements"
    missed = told if found.difference["detectable"] > 0 and not found.direction else ""
    size = f"{evaluation['n_prompts']} prompts, {evaluation['samples_per_prompt']} samples each"
    claim = f"{result['verdict'].capitalize()}: mean toxicity by {judge} {change}"
    p = "< 0.001" if found.difference["p"] < 0.001 else f"= {found.difference['p']:.3f}"
    return claim, f"({found.evidence}, p {p}; {size}{missed})"


def changes(evaluation: dict[str, Any]) -> tuple[list[Measure], list[Measure]]:
    """Return what changed, by intervals that exclude 0, and what did not; of the judges only the primary one counts."""
    primary = evaluation["primary_judge"]
    measures = measured(evaluation | {"toxicity": {primary: evaluation["toxicity"][primary]}}).values()
    return [m for m in measures if m.direction], [m for m in measures if not m.direction]


def measured(system: dict[str, Any]) -> dict[str, Measure]:
    """Return every measure of one way of training by its label: toxicity by each judge, then quality."""
    toxicity = [_by_judge(judge, result) for judge, result in system["toxicity"].items()]
    found = [(about, system["quality"][name]) for name, about in _QUALITY.items() if name in system["quality"]]
    quality = [Measure(*about, r["before"], r["after"], r["difference"]) for about, r in found]
    return {measure.label: measure for measure in (*toxicity, *quality)}


def _by_judge(judge: str, r: dict[str, Any]) -> Measure:
    label, what = f"Toxicity by {judge}", "in [0, 1]"
    return Measure(label, what, 3, -1, r["before"]["mean"], r["after"]["mean"], r["difference"])


def after_name(evaluation: dict[str, Any]) -> str:
    """Return what "after" is called: the given name where something else than a run was measured."""
    return str(evaluation["names"].get("after", "reinforcement learning"))


def system_name(name: str) -> str:
    """Return what the page calls a policy."""
    return _SYSTEMS.get(name) or re.sub(r"^best_of_(\d+)$", r"Best of \1 by the reward", name)


def systems(evaluation: dict[str, Any], first: str) -> dict[str, dict[str, Measure]]:
    """Return what each policy reached; `first` names the one that "after" is, whose measures are the table's rows."""
    baselines = {system_name(name): measured(system) for name, system in evaluation["baselines"].items()}
    return {first: measured(evaluation)} | baselines


def beside_baselines(evaluation: dict[str, Any], after: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Say which baselines do as well as `after`, or better; return by name how each compares, the verdict in words."""
    words = {
        "ahead": f"{after} does better",
        "behind": f"does better than {after}",
        "level": f"does as well as {after}",
        "a trade": f"{after} is better in one of the two, this in the other",
        "undecided": "too few prompts to tell",
    }
    found, named = {}, dict.fromkeys(words, "")
    for name, one in evaluation["baselines"].items():
        verdict = one["after"]["verdict"]
        found[system_name(name)] = one["after"] | {"kl_bound": one.get("kl_bound"), "verdict": words[verdict]}
        named[verdict] += f", {system_name(name)}"
    enough, undecided = (named["behind"] + named["level"])[2:], named["undecided"][2:]
    told = f"As good as {after}, or better: {enough}." if enough else f"None is shown to do as well as {after}."
    return told + (f" Too few prompts to tell: {undecided}." if undecided else ""), found


def data_account(rows: dict[str, Any]) -> dict[str, Any]:
    """Return rows.json with "counts", each outcome's rows by source split, uses first, and their sums by split."""
    splits = rows["splits"].values()
    outcomes = sorted(dict.fromkeys(chain(*splits)), key=lambda outcome: not outcome.startswith("used"))
    counts = {outcome: [split.get(outcome, 0) for split in splits] for outcome in outcomes}
    return rows | {"counts": counts, "sums": [sum(split.values()) for split in splits]}


def changed_on_its_way(evaluation: dict[str, Any]) -> list[str]:
    """Return what was changed when the run went on, a line for each time: `At step 40: rl.steps 40 → 80`."""
    lines = []
    for record in evaluation.get("changed_on_its_way", []):
        pairs = [f"{name} {before} → {now}" for name, (before, now) in record["changes"].items()]
        when = f"At step {record['step']}" if record["stage"] == "train" else f"Before {record['stage']} went on"
        lines.append(f"{when}: {', '.join(pairs)}")
    return lines


def number(value: float | None, decimals: int = 3) -> str:
    """Return the rounded value with a true minus sign; a dash for no value."""
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return "—" if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def signed(value: float, decimals: int = 3) -> str:
    """Return the rounded value with its sign, plus included; zero has none."""
    return ("+" if round(value, decimals) > 0 else "") + number(value, decimals)


def percent(share: float | None, sign: bool = False) -> str:
    """Return a share as whole percent."""
    return "—" if share is None else f"{signed(100 * share, 0) if sign else number(100 * share, 0)} %"


def duration(seconds: float) -> str:
    """Return seconds as `12.3 s` or `4 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
