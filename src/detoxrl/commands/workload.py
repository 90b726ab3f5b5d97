"""How often does a run make each kind of step, and how is its time divided?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from detoxrl.config.schema import Config
from detoxrl.data.rows import Row
from detoxrl.evaluation.identity_sentences import groups_within, numbered_sentences
from detoxrl.training.own_samples import SAMPLES, sampled_prompts
from detoxrl.training.preferences import pairs_per_step

Rows = Mapping[str, Sequence[Row]]
"""Rows by split."""
_DPO = "DPO baseline"


class StepSeconds(NamedTuple):
    """Seconds of one step of each kind. All but `finetune` are those of one response."""

    sample: float  # Encode the prompt and sample the response.
    reference: float  # Compute the response's log-probs under the reference.
    score: float  # Compute its reward.
    update: float  # Learn from it in one epoch.
    judges: list[float]  # Rate it, by each judge; the primary judge is first.
    finetune: float = 0.0  # Make one optimizer step of supervised fine-tuning.


# The proportions of the steps to each other, as the quickstart has them: a screen says with them how long a run takes
# before it has come to every kind of step. The unit is the time of sampling one response.
PROPORTIONS = StepSeconds(sample=1.0, reference=0.15, score=0.05, update=0.55, judges=[0.1], finetune=40.0)


def bar_seconds(config: Config, rows: Rows, step: StepSeconds) -> dict[str, float]:
    """Return the seconds of each progress bar of a run, by its name and in its order."""
    rl = config.rl
    normalised = min(config.reward.normalise_on, len(rows["train"]))
    trained = rl.steps * rl.batch_size
    validations = -(-rl.steps // rl.validate_every) + 1  # The last policy is validated too.
    validated = validations * len(rows["validation"])

    train = normalised * (step.sample + step.score)
    train += (trained + validated) * (step.sample + step.reference + step.score)
    train += trained * rl.epochs * step.update
    train += validated * step.judges[0]

    # Measured are the initial policy and the trained one, both also with top-p, the control for sharpening and the
    # baselines. Best-of-n takes more of the initial policy.
    baselines = baseline_names(config, rows)
    evaluation = config.evaluation
    policies = 2 + 2 * int(evaluation.top_p is not None) + int(evaluation.sharpened) + len(baselines)
    pool = max(evaluation.best_of, default=0) * evaluation.best_of_samples
    samples = policies * evaluation.samples_per_prompt + pool
    identity_prompts = len(numbered_sentences(groups_within(evaluation.identity_prompts)))
    evaluated = samples * len(rows["test"]) + 2 * evaluation.samples_per_prompt * identity_prompts

    seconds = {"warm start": config.sft.steps * step.finetune}
    for name in baselines:
        seconds[name] = config.sft.baseline_steps * _baseline_step(name, config, step)
    seconds["train"] = train
    seconds["sample"] = evaluated * step.sample
    seconds["measure"] = evaluated * (step.score + sum(step.judges))
    return seconds


def stage_seconds(config: Config, rows: Rows, step: StepSeconds) -> dict[str, float]:
    """Return the seconds of the stages sft, train and evaluate: those of a step, times how often a run makes it."""
    bars = bar_seconds(config, rows, step)
    train = bars.pop("train")
    evaluate = bars.pop("sample") + bars.pop("measure")
    own_samples = SAMPLES * sampled_prompts(config.sft, len(rows["train"]))
    sft = sum(bars.values()) + own_samples * (step.sample + step.score)
    return {"sft": sft, "train": train, "evaluate": evaluate}


def _baseline_step(name: str, config: Config, step: StepSeconds) -> float:
    """Return the seconds of one optimizer step of a baseline."""
    if name == _DPO:
        return 2 * pairs_per_step(config.sft) * step.update
    return step.finetune


def baseline_names(config: Config, rows: Rows) -> list[str]:
    """Return the baselines that a run trains.

    One learns from civil references if there are some. The others learn from the initial policy's own responses: from
    the best ones, and from the best and the worst ones.
    """
    if config.sft.baseline_steps == 0:
        return []

    names = ["best-of-4 baseline", _DPO]
    if any(row.civil_references for row in rows["train"]):
        names.insert(0, "civil baseline")
    return names
