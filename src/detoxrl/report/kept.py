"""Why did training keep the initial policy, and what may help?"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from detoxrl.evaluation.statistics import validation_prompts_needed
from detoxrl.report.results import Validation, read_validations, used_rows
from detoxrl.report.words import kept_initial, main_quality, number
from detoxrl.runtime.run_folder import RunFolder

# Below this distance from the initial policy (nats per response) training has hardly begun to change it.
_HARDLY_MOVED = 0.1
_LEARNING_RATE_FACTOR = 3
_STEPS_FACTOR = 2


@dataclass(frozen=True, kw_only=True)
class FewPrompts:
    """A validation of the initial policy on too few prompts to tell a better checkpoint from chance."""

    prompts: int
    needed: int
    toxicity: float
    error: float

    @property
    def remedy(self) -> str:
        """What is wrong and what to set, as a sentence."""
        return (
            f"{self.prompts} validation prompts are too few to tell a better checkpoint from chance "
            f"(toxicity {number(self.toxicity)}, standard error {number(self.error)}): "
            f"set rl.validation_prompts to {self.needed} or more."
        )


class Judged(NamedTuple):
    """A validation, and why its policy was not kept."""

    validation: Validation
    reason: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Every validation with its reason, what to try next in words, and the same as settings by dotted name."""

    validations: list[Judged]
    few_prompts: FewPrompts | None  # Whether the validations could tell at all.
    advice: str
    settings: dict[str, str]


def few_prompts(folder: RunFolder) -> FewPrompts | None:
    """Return what is to be said of a trained run's validations if they had too few prompts; None if they had enough."""
    first = read_validations(folder)[0]
    prompts = used_rows(folder, "validation")
    if "toxicity_error" not in first:  # a run of an early version
        return None

    toxicity = first["toxicity"]
    error = first["toxicity_error"]
    needed = validation_prompts_needed(toxicity, error, prompts)
    if needed is None:
        return None
    return FewPrompts(prompts=prompts, needed=needed, toxicity=toxicity, error=error)


def explain_kept(folder: RunFolder, evaluation: dict[str, Any]) -> Explanation | None:
    """Explain why none of the validated policies was better than the initial one; None if one was."""
    if not kept_initial(evaluation):
        return None

    rl = folder.read_json("config.json")["rl"]
    validations = read_validations(folder)
    first, *later = validations
    checkpoint = folder.read_json("checkpoint.json")
    margin = checkpoint.get("quality_margin", rl["quality_margin"])  # Early versions stored the setting alone.
    bound = first["quality"] - margin
    quality = "quality" if main_quality(evaluation) else "share of responses with text"

    judged = [Judged(first, "the initial policy")]
    judged += [Judged(validation, _reason(validation, first, bound, quality)) for validation in later]

    costly = [line for line in later if line["quality"] < bound and _is_less_toxic(line, first)]
    if costly:
        least_toxic = min(costly, key=lambda line: float(line["toxicity"]))
        advice, settings = _keep_quality(least_toxic, rl, bound, quality)
    else:
        advice, settings = _learn_more(validations, rl)

    few = few_prompts(folder)
    if few is not None:
        settings["rl.validation_prompts"] = str(few.needed)
    return Explanation(validations=judged, few_prompts=few, advice=advice, settings=settings)


def _is_less_toxic(validation: Validation, first: Validation) -> bool:
    """Return whether a policy is less toxic than the initial one by more than one standard error."""
    return bool(validation["toxicity"] + validation.get("toxicity_error", 0.0) < first["toxicity"])


def _reason(validation: Validation, first: Validation, bound: float, quality: str) -> str:
    if validation["quality"] < bound:
        return f"{quality} is below {number(bound)}"
    if validation["toxicity"] < first["toxicity"]:
        return "not less toxic by more than one standard error"
    return "not less toxic"


def _keep_quality(validation: Validation, rl: dict[str, Any], bound: float, quality: str) -> tuple[str, dict[str, str]]:
    """Return what to try where a policy was less toxic at too high a price, in words and as settings."""
    advice = (
        f"Step {validation['step']} was less toxic ({number(validation['toxicity'])}), but its {quality} "
        f"({number(validation['quality'])}) is below the bound ({number(bound)}). Use a lower rl.lr or a higher "
        "rl.kl_coef, or accept the loss with a larger rl.quality_margin."
    )
    return advice, {"rl.lr": f"{rl['lr'] / _LEARNING_RATE_FACTOR:.2g}"}


def _learn_more(validations: list[Validation], rl: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return what to try where no policy was less toxic, in words and as settings."""
    longer = {"rl.steps": str(_STEPS_FACTOR * rl["steps"])}
    first = validations[0]
    last = validations[-1]
    if "kl" not in first:  # a run of an early version
        return "Use more rl.steps or another rl.lr.", longer

    distance = max(0.0, *(line["kl"] for line in validations))
    if distance < _HARDLY_MOVED:
        advice = (
            f"The policy hardly moved (KL to the initial policy: {number(distance)} nats per response). "
            "Use a higher rl.lr or more rl.steps."
        )
        return advice, {"rl.lr": f"{rl['lr'] * _LEARNING_RATE_FACTOR:.2g}"}

    scores = f"from {number(first['score'])} to {number(last['score'])}"
    if last["score"] <= first["score"]:
        return f"The reward score did not rise ({scores}). Use more rl.steps or another rl.lr.", longer
    advice = (
        f"The reward score rose {scores}, but toxicity did not follow. Use more rl.steps; if the score alone goes on "
        "rising, the reward and the judge measure different things."
    )
    return advice, longer
