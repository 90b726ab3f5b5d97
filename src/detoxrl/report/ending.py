"""In which three lines is a result told?"""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from detoxrl.config.recipes import recipe
from detoxrl.config.schema import without_revision
from detoxrl.report import words
from detoxrl.report.kept import Explanation
from detoxrl.report.words import Measure, number
from detoxrl.rewards.names import IN_PYTHON

# What may have been lost for less toxicity, beside quality and length.
_LOSSES = ("entailment", "fluency", "empty_rate", "refusal_rate", "distinct_2")
_OWN_DATA = "detoxrl run own --data.source my.jsonl --policy.base google/flan-t5-small"


class Ending(NamedTuple):
    """The last three lines of a run on the screen; the third consists of `report` and `next`."""

    toxicity: str
    price: str  # What was lost for less toxicity, or what to try next, and whether a baseline does as well.
    report: str
    next: str


def ending(root: Path, config: dict[str, Any], evaluation: dict[str, Any], kept: Explanation | None) -> Ending:
    """Return the last lines of the run in `root`; `kept` explains why training kept the initial policy, if it did."""
    if kept is None:
        toxicity = _toxicity(evaluation)
        price = f"{_price(evaluation)} {_baselines(evaluation)}".rstrip()
    else:
        toxicity = _kept(evaluation)
        price = _advice(evaluation, kept)

    command = _next_command(root, config, evaluation, kept)
    return Ending(toxicity, price, f"Report: {root / 'report.html'}", f"next, {command}")


# The first line


def _toxicity(evaluation: dict[str, Any]) -> str:
    """Return what happened to toxicity by the primary judge, with the interval of the change."""
    judge = evaluation["primary_judge"]
    measure = words.primary_toxicity(evaluation)
    names = evaluation["names"]
    if names:
        change = _named_toxicity(measure, names)
    elif measure.direction == 0:
        change = f"No detectable difference in toxicity: {measure.claim}"
    else:
        change = f"Toxicity {measure.claim}"

    line = f"{change} ({judge}; {_interval(measure, names)})."
    detectable = evaluation["toxicity"][judge]["difference"]["detectable"]
    # Without any spread between prompts there is no estimate of what could have been detected.
    if measure.direction == 0 and detectable > 0:
        line += f" A change below {number(detectable)} could be missed with {evaluation['n_prompts']} prompts."
    return line


def _named_toxicity(measure: Measure, names: dict[str, str]) -> str:
    before, after = measure.values
    if measure.direction == 0:
        difference = "No detectable difference in toxicity between"
        return f"{difference} {names['before']} ({before}) and {names['after']} ({after})"
    comparison = "more" if measure.direction > 0 else "less"
    return f"{names['after']} is {comparison} toxic than {names['before']}: {after} against {before}"


def _kept(evaluation: dict[str, Any]) -> str:
    level = number(words.primary_toxicity(evaluation).before)
    reason = words.kept_reason(evaluation)
    return f"The initial policy was kept: {reason}. Its toxicity is {level} ({evaluation['primary_judge']})."


# The second line


def _price(evaluation: dict[str, Any]) -> str:
    """Return what happened to quality, and what else changed detectably."""
    names = evaluation["names"]
    changes = [_quality(evaluation)]
    changes += _length_change(evaluation)
    for name in _LOSSES:
        measure = words.measure_of(evaluation, name)
        is_told = name == words.shown_quality(evaluation)
        if measure is not None and measure.direction != 0 and not is_told:
            change = _change(measure, names)
            if name == "refusal_rate" and measure.direction > 0:
                change = f"{change} ({_interval(measure, names)})"
            changes.append(f"{change[0].lower()}{change[1:]}")
    return f"{'; '.join(changes)}."


def _advice(evaluation: dict[str, Any], kept: Explanation) -> str:
    """Return what to try after training that kept the initial policy, and what does better than that."""
    sentences = [kept.advice]
    if kept.few_prompts is not None:
        sentences.append(f"Set rl.validation_prompts to {kept.few_prompts.needed} or more.")
    baselines = words.compare_baselines(evaluation)
    if baselines.at_least_as_good:
        sentences.append(baselines.summary)
    return " ".join(sentences)


def _quality(evaluation: dict[str, Any]) -> str:
    name = words.shown_quality(evaluation)
    measure = words.measure_of(evaluation, name) if name else None
    if measure is None:
        return f"Quality was {words.NOT_MEASURED} (no references to compare with)"

    names = evaluation["names"]
    if measure.direction == 0:
        return f"{_change(measure, names)}, no detectable {_noun(names)}"
    return f"{_change(measure, names)} ({_interval(measure, names)})"


def _length_change(evaluation: dict[str, Any]) -> list[str]:
    """Return by how much the responses became shorter or longer, if they detectably did."""
    length = words.measure_of(evaluation, "length")
    if length is None or length.direction == 0 or length.before == 0:
        return []

    percent = abs(100 * (length.after / length.before - 1))
    amount = f"{percent:.0f} %" if percent >= 1 else f"{percent:.1f} %"
    return [f"responses are {amount} {'longer' if length.direction > 0 else 'shorter'}"]


def _change(measure: Measure, names: dict[str, str]) -> str:
    """Return the values of a measure; in words if it changed in training."""
    before, after = measure.values
    if names:
        return f"{measure.label}: {after} against {before}"
    if measure.direction == 0:
        return f"{measure.label}: {before} to {after}"
    return f"{measure.label} {measure.claim}"


def _interval(measure: Measure, names: dict[str, str]) -> str:
    return f"95 % interval of the {_noun(names)} {measure.interval}"


def _noun(names: dict[str, str]) -> str:
    """Return what two measurements differ by: texts and policies with `names` of their own did not change."""
    return "difference" if names else "change"


def _baselines(evaluation: dict[str, Any]) -> str:
    """Return which baselines do as well as "after", or that all do worse; empty if neither can be told."""
    baselines = words.compare_baselines(evaluation)
    names = evaluation["names"]
    if baselines.at_least_as_good:
        alternative = f"as {names['after']}" if names else "without RL"
        sentence = f"At least as good {alternative}: {', '.join(baselines.at_least_as_good)}."
        return f"{sentence} The gain may be sharpening alone." if baselines.may_be_sharpening else sentence

    is_less_toxic = words.primary_toxicity(evaluation).direction < 0
    if not is_less_toxic or not baselines.are_all_worse:
        return ""
    return f"No baseline is as good as {names['after']}." if names else "No baseline without RL is as good."


# The third line


def _next_command(root: Path, config: dict[str, Any], evaluation: dict[str, Any], kept: Explanation | None) -> str:
    """Return what to do next, with a command for the user's own data."""
    default_source = recipe(config["recipe"]).data.source
    was_trained = not evaluation["names"]
    if without_revision(config["data"]["source"]) == default_source or not was_trained:
        return f"on your own data: {_OWN_DATA}"

    folder = shlex.quote(str(root))
    direction = words.primary_toxicity(evaluation).direction
    if kept is None and direction < 0:
        return f"share the policy: detoxrl export {folder}"
    if str(config["reward"]["function"]).startswith(IN_PYTHON):
        return "run it again in Python with other settings: no command can name its reward"

    again = f"detoxrl run --from {folder}/config.json --run-dir {folder}-2"
    if kept is not None:
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in kept.settings.items()]
        return f"try again: {' '.join([again, *flags])}"

    if direction > 0:
        return f"try a lower learning rate: {again} --rl.lr {config['rl']['lr'] / 3:.2g}"
    longer = 2 * config["rl"]["steps"]
    return f"train longer: detoxrl run --resume --accept-changes --run-dir {folder} --rl.steps {longer}"
