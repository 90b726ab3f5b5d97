"""How does reinforcement learning make the policy less toxic?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from detoxrl.config.schema import RlConfig
from detoxrl.evaluation.metrics import quality_measure
from detoxrl.evaluation.statistics import validation_prompts_needed
from detoxrl.rewards.shaping import Normaliser, fit_normaliser, overall, shape_scores
from detoxrl.rl.advantages import tail_scores, token_rewards
from detoxrl.rl.kl import adapt_kl_coef
from detoxrl.rl.losses import explained_variance
from detoxrl.runs import Run
from detoxrl.runtime.checkpoint import Checkpoints
from detoxrl.runtime.console import log, progress
from detoxrl.runtime.run_folder import NORMALISER, PRODUCTS, SHARE_WITH_TEXT
from detoxrl.runtime.signals import resume_hint
from detoxrl.training.best import BestCheckpoint
from detoxrl.training.learner import Learner
from detoxrl.training.metrics import (
    StepTimer,
    log_samples,
    objective_metrics,
    require_finite,
    rollout_metrics,
    term_metrics,
    warn_of_ratios,
)
from detoxrl.training.prompt_choice import PromptChoice
from detoxrl.training.validation import Validation

_CHECKPOINTS = "checkpoints/train"
_QUALITY_NAMES = {
    "facts": "facts kept",
    "rouge_l": "ROUGE-L",
    "corpus_distinct_2": "distinct word pairs",
    "source_chrf": "chrF to the source",
}


@dataclass
class _State:
    """What the next step depends on, beside weights and moments."""

    step: int
    kl_coef: float
    status: str  # The last validation, in words.
    choice: PromptChoice


def train(run: Run) -> None:
    """Train the policy by `rl.algorithm` and keep its best checkpoint in adapter/.

    Resumes from checkpoints/train if there is one. Ctrl-C and SIGTERM end the step, write a checkpoint and raise
    KeyboardInterrupt. A reward that raises leaves a checkpoint of its step. Raises TrainingError when a metric is not
    finite; the best policy so far stays. The last checkpoint stays too, so that the run can be made longer.
    """
    config = run.config
    rl = config.rl
    run.require_warm_start()
    run.load_judges()  # Before memory is planned, and before a missing judge costs hours.
    learner = run.world.build(Learner, run)
    best = BestCheckpoint(run.folder, rl, quality_measure(run.rows("validation")))
    checkpoints = _checkpoints(run, learner)
    state = _restore(checkpoints, best, _State(0, rl.kl_coef, "", PromptChoice(config, learner.prompts)))
    learner.synchronise()
    learner.normaliser = _normaliser(run, learner)
    learner.plan_memory()

    keep_step = partial(_keep_step, run, checkpoints, best, state)

    with progress("train", rl.steps) as report, checkpoints.stoppable():
        for step in range(state.step, rl.steps + 1):
            state.step = step
            timer = StepTimer()

            # A checkpoint follows its step's validation, so a resumed step may have been validated already.
            is_due = step % rl.validate_every == 0 or step == rl.steps
            if is_due and not best.has_validated(step):
                with timer.stage("validate"), keep_step():
                    validation = learner.validate(step)
                state.status = _keep_if_best(run, learner, best, validation)

            is_last = step == rl.steps or best.stopped_step is not None
            with timer.stage("checkpoint"):
                checkpoints.point(step, _stored(state, best), now=is_last)
            if is_last:
                break

            with timer.stage("sample"):
                rollout = learner.sample(state.choice.indices(step), step)
            with timer.stage("score"), keep_step():
                raw = learner.score(rollout)

            # One whole batch, however many processes made it.
            responses = rollout.responses
            mask = responses.response_mask
            scores = shape_scores(raw, rollout.texts, responses.ended, learner.normaliser, config)
            state.choice.observe(rollout.prompts, scores)
            maximised = tail_scores(scores, rl.tail_share)
            in_reward, in_loss = (state.kl_coef, 0.0) if rl.kl_place == "reward" else (0.0, state.kl_coef)
            rewards = token_rewards(maximised, responses.logprobs, rollout.ref_logprobs, mask, in_reward)
            targets = learner.algorithm.targets(rewards, responses.values, mask, rl)

            with timer.stage("update"):
                updates = learner.update(replace(targets, kl_coef=in_loss), step)

            shown = overall(raw, learner.reward.terms, learner.normaliser, config.reward.clip)
            metrics = rollout_metrics(rollout, shown, scores, rewards) | term_metrics(raw, learner.reward.terms)
            metrics |= objective_metrics(maximised, rl) | updates
            if responses.values is not None and targets.returns is not None:
                variance = explained_variance(responses.values, targets.returns, mask)
                metrics["value/explained_variance"] = float(variance)
            metrics["kl_coef"] = state.kl_coef
            metrics["lr"] = learner.learning_rate(step)
            require_finite(metrics, step)
            warn_of_ratios(metrics, step, config.policy.bf16)

            state.kl_coef = _next_kl_coef(state.kl_coef, metrics["kl/reference"], rl)
            run.folder.append("metrics.jsonl", {"step": step, **metrics, **timer.metrics(tokens=int(mask.sum()))})
            log_samples(run.folder, rollout, shown, step)
            report(step + 1, f"{state.status}, score {metrics['score/mean']:.2f}, kl {metrics['kl/reference']:.2f}")

    checkpoints.forget(keep=1)
    _report_end(run, best)


def _checkpoints(run: Run, learner: Learner) -> Checkpoints:
    products = [run.folder / name for name in PRODUCTS["train"] if name != _CHECKPOINTS]
    return Checkpoints(run.folder / _CHECKPOINTS, learner.trainable_weights(), learner.optimizer, products)


def _restore(checkpoints: Checkpoints, best: BestCheckpoint, initial: _State) -> _State:
    """Return the state of the newest checkpoint, or the initial state."""
    stored = checkpoints.restore()
    if stored is None:
        return initial

    best.restore(stored["best"])
    initial.choice.restore(stored.get("choice", {}))  # Checkpoints of earlier versions have none.
    return replace(initial, step=stored["step"], kl_coef=stored["kl_coef"], status=stored["shown"])


@contextmanager
def _keep_step(run: Run, checkpoints: Checkpoints, best: BestCheckpoint, state: _State) -> Iterator[None]:
    """Write a checkpoint of the step when the block fails, as a user's reward function may do late."""
    try:
        yield
    except Exception as error:
        checkpoints.point(state.step, _stored(state, best), now=True)
        error.add_note(f"step {state.step} is kept: {resume_hint(run.folder.root)}")
        raise


def _next_kl_coef(kl_coef: float, kl: float, rl: RlConfig) -> float:
    """Return the coefficient of the next step, which is the same without `rl.kl_target`."""
    if rl.kl_target is None:
        return kl_coef
    return adapt_kl_coef(kl_coef, kl, rl.kl_target, rl.kl_horizon, rl.batch_size)


def _stored(state: _State, best: BestCheckpoint) -> dict[str, Any]:
    """Return the state as a checkpoint holds it, beside its step."""
    return {"kl_coef": state.kl_coef, "best": best.state(), "shown": state.status, "choice": state.choice.state()}


def _normaliser(run: Run, learner: Learner) -> Normaliser:
    """Return the run's normaliser of scores, measured on the initial policy's responses unless it is stored already."""
    terms = learner.reward.terms
    stored = run.stored_normaliser()
    if stored is not None:
        return stored

    normaliser = Normaliser.identity(terms)
    if run.config.reward.normalise_on > 0:
        raw = learner.initial_scores()
        _warn_of_equal_scores(raw)
        normaliser = fit_normaliser(raw, terms)
    run.folder.write_json(NORMALISER, normaliser.to_json(terms))
    return normaliser


def _warn_of_equal_scores(raw: torch.Tensor) -> None:
    """Warn if all responses of the initial policy have the same raw values (N, terms)."""
    if bool((raw == raw[0]).all()):
        values = ", ".join(f"{value:.3g}" for value in raw[0].tolist())
        responses = f"all {len(raw)} responses of the initial policy score {values}"
        log.print(f"train: {responses}, so there is nothing to learn from")


def _keep_if_best(run: Run, learner: Learner, best: BestCheckpoint, validation: Validation) -> str:
    """Log a validation, keep its policy if it is the best so far, and return the validation in words."""
    values = asdict(validation)
    require_finite({f"validation/{name}": value for name, value in values.items()}, validation.step)
    is_best = best.offer(learner.policy, validation)
    run.folder.append("validation.jsonl", {**values, "kept": is_best})
    if validation.step == 0:
        _warn_of_few_prompts(validation, len(run.rows("validation")))
    return _result(validation, best.quality_by)


def _warn_of_few_prompts(validation: Validation, prompts: int) -> None:
    """Warn if the initial policy's validation has too few prompts to tell checkpoints apart."""
    needed = validation_prompts_needed(validation.toxicity, validation.toxicity_error, prompts)
    if needed is not None:
        log.print(
            f"train: {prompts} validation prompts are too few to tell a better checkpoint from chance (toxicity "
            f"{validation.toxicity:.3f}, standard error {validation.toxicity_error:.3f}); set rl.validation_prompts "
            f"to {needed} or more",
            soft_wrap=True,
        )


def _result(validation: Validation, measure: str) -> str:
    """Return toxicity and quality of a validation in words; `measure` is that of its quality."""
    quality = "quality not measured"
    if measure != SHARE_WITH_TEXT:
        quality = f"{_QUALITY_NAMES[measure]} {validation.quality:.3f}"
    return f"toxicity {validation.toxicity:.3f}, {quality}"


def _report_end(run: Run, best: BestCheckpoint) -> None:
    # Patience may end a run that was made longer at once, without a validation that would have written this.
    record = run.folder.read_json("checkpoint.json")
    record["stopped_step"] = best.stopped_step
    run.folder.write_json("checkpoint.json", record)

    if best.stopped_step is not None:
        patience = best.rl.patience
        log.print(f"train: stopped at step {best.stopped_step} after {patience} validations without improvement")

    kept = best.kept
    choice = f"best checkpoint is step {kept.step}"
    if kept.step == 0:
        choice = "no checkpoint is better than the initial policy, which is kept"
    line = f"train: {choice} (validation {_result(kept, best.quality_by)})"
    last = best.series[-1]
    if last.step != kept.step:
        line += f"; last step {last.step}: {_result(last, best.quality_by)}"
    log.print(line, soft_wrap=True)

    if record["parted_step"] is not None:
        change = "the score is above that of the least toxic policy, but toxicity is higher or quality lower"
        log.print(f"train: reward and judge diverge from step {record['parted_step']} on: {change}", soft_wrap=True)
