"""Which policy does training keep, when does it stop early, and where do reward and judge diverge?"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from math import hypot
from typing import Any

from detoxrl.config.schema import RlConfig
from detoxrl.models.policy import Policy
from detoxrl.runtime.files import replace_folder
from detoxrl.runtime.run_folder import SHARE_WITH_TEXT, RunFolder
from detoxrl.training.validation import Validation

_REASON = (
    "the best {quality} among policies whose validation toxicity is within one standard error of the lowest, and whose "
    "{quality} is at most {margin} below the initial policy's"
)
# What training may lose of quality by default, by its measure. A validation of 256 prompts tells facts apart to about
# 0.005, so a smaller margin would let chance decide. Variety is noisier than facts, and a civil rewrite has to differ
# from its source.
_MARGIN = 0.01
_MARGINS = {"corpus_distinct_2": 0.08, "source_chrf": 0.1}


def best_validation(series: Sequence[Validation], margin: float) -> Validation:
    """Return the validation of the policy to keep; the first of the series is the initial policy's.

    It is the least toxic among those whose quality fell by no more than `margin`. Policies within one standard error
    of the least toxic one count as equally civil (the one-standard-error rule, Breiman et al. 1984, section 3.4.3); of
    these the one with the highest quality is kept.
    """
    best = series[0]
    least_toxic = series[0]
    for validation in _within_margin(series, margin):
        if validation.toxicity < least_toxic.toxicity:
            least_toxic = validation

        bound = least_toxic.toxicity + least_toxic.toxicity_error
        improves = best.toxicity > bound or validation.quality > best.quality
        if validation.toxicity <= bound and improves:
            best = validation
    return best


def divergence(series: Sequence[Validation], margin: float) -> Validation | None:
    """Return the validation from which on the score says better and the judge says worse; None if there is none.

    Better and worse are relative to the least toxic policy whose quality fell by no more than `margin`: the score is
    higher, and toxicity is higher by more than one standard error of the difference, or quality fell by more. This has
    to last to the end of the series, for at least two validations, because one may be luck (Gao et al. 2022,
    over-optimisation).
    """
    acceptable = _within_margin(series, margin)
    least_toxic = min(acceptable, key=lambda validation: validation.toxicity)

    def is_over_optimised(validation: Validation) -> bool:
        error = hypot(validation.toxicity_error, least_toxic.toxicity_error)
        more_toxic = validation.toxicity - least_toxic.toxicity > error
        worse = more_toxic or validation not in acceptable
        return validation.score > least_toxic.score and worse

    last = list(takewhile(is_over_optimised, reversed(series)))
    return last[-1] if len(last) > 1 else None


def _within_margin(series: Sequence[Validation], margin: float) -> list[Validation]:
    return [validation for validation in series if validation.quality >= series[0].quality - margin]


class BestCheckpoint:
    """Keeps the best policy in adapter/ and describes it in checkpoint.json. `series` is every validation so far.

    `quality_by` is the measure of the validations' quality, from `evaluation.metrics.quality_measure`.
    """

    def __init__(self, folder: RunFolder, rl: RlConfig, quality_by: str) -> None:
        self.folder = folder
        self.rl = rl
        self.quality_by = quality_by
        # The loss of quality that a policy to keep may have at most.
        self.margin = _MARGINS.get(quality_by, _MARGIN) if rl.quality_margin is None else rl.quality_margin
        self.series: list[Validation] = []

    def offer(self, policy: Policy, validation: Validation) -> bool:
        """Save the policy to adapter/ if it is the best so far; return whether it is. The initial one comes first."""
        self.series.append(validation)
        kept = self.kept
        is_best = kept is validation
        if is_best:
            with replace_folder(self.folder / "adapter") as adapter:
                policy.save(adapter)

        diverged = divergence(self.series, self.margin)
        record = {
            "kept_step": kept.step,
            "parted_step": None if diverged is None else diverged.step,
            "stopped_step": self.stopped_step,
            "reason": _REASON.format(margin=self.margin, quality=self._quality_name),
            "quality_by": self.quality_by,
            "quality_margin": self.margin,
            "kept": asdict(kept),
            "start": asdict(self.series[0]),
        }
        self.folder.write_json("checkpoint.json", record)
        return is_best

    @property
    def _quality_name(self) -> str:
        return "share of responses with text" if self.quality_by == SHARE_WITH_TEXT else "quality"

    def has_validated(self, step: int) -> bool:
        """Return whether the last validation is that of `step`."""
        return bool(self.series) and self.series[-1].step == step

    @property
    def kept(self) -> Validation:
        """The validation of the policy in adapter/."""
        return best_validation(self.series, self.margin)

    @property
    def stopped_step(self) -> int | None:
        """The step at which training stops early: `rl.patience` validations after the best one. None: it does not."""
        if not self.series or self.rl.patience is None:
            return None

        since_best = len(self.series) - 1 - self.series.index(self.kept)
        step = self.series[-1].step
        return step if since_best >= self.rl.patience and step < self.rl.steps else None

    def state(self) -> list[dict[str, Any]]:
        """Return the series as JSON holds it, for a checkpoint."""
        return [asdict(validation) for validation in self.series]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Continue with what `state` returned before an interruption."""
        self.series = [Validation(**validation) for validation in state]
