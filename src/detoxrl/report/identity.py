"""What does the report say of judges, reward and policy where a text mentions a group?"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from detoxrl.report.words import Measure, Metric, measure_of, number, percent, signed
from detoxrl.runtime.run_folder import REWARD_JUDGE

_TOXICITY = Metric("Toxicity", "in [0, 1], by the primary judge", -1)
_REWARD = "the reward's score"
_ON_MENTIONS = "On civil prompts that mention a group"


class AuditedRater(NamedTuple):
    """What a judge or the reward gives to sentences that mention a group."""

    name: str
    unit: str
    summary: str
    groups: dict[str, dict[str, Any]]  # As in eval.json, by group.
    flagged: list[str]
    gives_toxicity: bool


class Answers(NamedTuple):
    """How the policies answer prompts that mention a group, and how much that differs from neutral prompts."""

    n_prompts: int
    samples_per_prompt: int
    measures: list[dict[str, Measure]]  # Each measure on prompts with a mention and on neutral ones, and their gap.
    groups: dict[str, list[dict[str, Any]]]  # By group: the gap in each measure, as in eval.json.
    flagged: list[str]  # In words.


def raters(evaluation: dict[str, Any]) -> list[AuditedRater]:
    """Return what each judge and the reward give to the sentences; none for a run of an earlier version."""
    audit = evaluation.get("identity")
    if audit is None:
        return []

    shown = [_rater(name, result, gives_toxicity=True) for name, result in audit["judges"].items()]
    if audit["reward"] is not None:
        shown.append(_rater(_REWARD, audit["reward"], gives_toxicity=False))
    return shown


def _rater(name: str, result: dict[str, Any], gives_toxicity: bool) -> AuditedRater:
    unit = "toxicity" if gives_toxicity else "standard deviations of the score"
    groups = result["groups"]
    flagged = result["flagged"]
    if flagged:
        comparison = "more toxic" if gives_toxicity else "lower"
        named = ", ".join(f"{group} ({signed(groups[group]['difference']['mean'])})" for group in flagged)
        summary = f"rated {comparison} than their neutral match: {named}."
    else:
        worst = result["worst"]
        difference = groups[worst]["difference"]
        summary = f"no group is flagged; the least favourable difference is that of {worst}, {_evidence(difference)}."
    if gives_toxicity:
        summary += f" It rates {percent(result['toxic_ratio'])} of the {result['sentences']} civil sentences as toxic."
    summary += f" The neutral terms lie {number(result['neutral_range'])} apart."
    return AuditedRater(name, unit, summary, groups, flagged, gives_toxicity)


def _evidence(difference: dict[str, float]) -> str:
    mean, low, high = (signed(difference[part]) for part in ("mean", "low", "high"))
    return f"{mean} (95% interval {low} to {high})"


def answers(evaluation: dict[str, Any]) -> Answers | None:
    """Return how policies answered prompts that mention a group; None where these were not sampled."""
    policy = (evaluation.get("identity") or {}).get("policy")
    if policy is None:
        return None

    measures = []
    groups: dict[str, list[dict[str, Any]]] = {}
    flagged: list[str] = []
    for name, result in policy["measures"].items():
        measures.append({part: _measure(name, result[part]) for part in ("mentions", "neutral", "gap")})
        for group, gap in result["groups"].items():
            groups.setdefault(group, []).append({**gap, "is_flagged": group in result["flagged"]})
        flagged += _flagged_changes(name, result)
    return Answers(policy["n_prompts"], policy["samples_per_prompt"], measures, groups, flagged)


def _measure(name: str, result: dict[str, Any]) -> Measure:
    if name == "toxicity":
        return Measure(_TOXICITY, result["before"], result["after"], result["difference"])
    measure = measure_of({"quality": {name: result}}, name)
    assert measure is not None
    return measure


def _flagged_changes(name: str, result: dict[str, Any]) -> Iterator[str]:
    """Yield in words each change of the gap that is flagged, of all terms together and of single groups."""
    label = _measure(name, result["gap"]).label
    label = f"{label[0].lower()}{label[1:]}"
    if result["is_flagged"]:
        yield f"{label} on all prompts with a mention against neutral ones, {_evidence(result['gap']['difference'])}"
    for group in result["flagged"]:
        difference = result["groups"][group]["difference"]
        yield f"{label} on {group} prompts against neutral ones, {_evidence(difference)}"


def refusals(evaluation: dict[str, Any]) -> dict[str, Measure]:
    """Return the refusals, by the prompts: the held-out ones, and those that mention a group if they were sampled."""
    by_prompts = {}
    held_out = measure_of(evaluation, "refusal_rate")
    if held_out is not None:
        by_prompts["On the held-out prompts"] = held_out

    policy = (evaluation.get("identity") or {}).get("policy")
    if policy is not None:
        by_prompts[_ON_MENTIONS] = _measure("refusal_rate", policy["measures"]["refusal_rate"]["mentions"])
    return by_prompts


def audit_warnings(evaluation: dict[str, Any]) -> list[str]:
    """Return what is to be said of group mentions at the end of a run, one line each; none if nothing was flagged."""
    lines: list[str] = []
    flagged = [_flagged_rater(rater) for rater in raters(evaluation) if rater.flagged]
    if flagged:
        lines.append(f"civil mentions of a group are rated less favourably than neutral words by {', '.join(flagged)}")

    answered = answers(evaluation)
    if answered is not None and answered.flagged:
        first, *others = answered.flagged
        lines.append(f"the policy answers mentions of a group otherwise than before: {first}{_and_more(others)}")

    on_mentions = refusals(evaluation).get(_ON_MENTIONS)
    if on_mentions is not None and on_mentions.direction > 0:
        lines.append(f"refusals on civil prompts that mention a group {on_mentions.claim} ({on_mentions.evidence})")
    return lines


def _flagged_rater(rater: AuditedRater) -> str:
    first, *others = rater.flagged
    unit = "" if rater.gives_toxicity else " standard deviations"
    name = f"the {rater.name}" if rater.name == REWARD_JUDGE else rater.name
    return f"{name} ({first} {signed(rater.groups[first]['difference']['mean'], 2)}{unit}{_and_more(others)})"


def _and_more(others: list[str]) -> str:
    return f" and {len(others)} more" if others else ""
