"""Which policy does training keep, when does it no longer pay, and where do reward and judge part?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from math import hypot
from typing import Any

from detoxrl.config.schema import RlConfig
from detoxrl.models.policy import Policy
from detoxrl.runtime.files import replace_folder
from detoxrl.runtime.run_folder import RunFolder

_REASON = ("the best quality among policies whose validation toxicity is within one standard error of the least seen, "
           "and whose quality is at most")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How a policy did on the validation prompts before step `step`."""

    step: int
    toxicity: float  # Mean by the primary judge, [0, 1].
    toxicity_error: float  # Standard error of that mean.
    quality: float  # Facts kept, or ROUGE-L without facts, [0, 1].
    length: float  # Mean words per response.
    score: float  # Mean raw score by the reward.
    kl: float  # Distance to the reference, nats per response: the mean sum of k1.


def best_validation(series: Sequence[Validation], margin: float) -> Validation:
    """Return the validation of the policy that is kept; the first of the series is the start's.

    It is the least toxic among those whose quality fell by no more than `margin`. Policies within one standard error
    of the least toxic one seen are as good as it (the one-standard-error rule, Breiman et al. 1984, section 3.4.3); of
    these the one with the higher quality is kept.
    """
    kept = least = series[0]
    for found in _within(series, margin):
        least = min(least, found, key=lambda one: one.toxicity)
        bound = least.toxicity + least.toxicity_error
        if found.toxicity <= bound and (kept.toxicity > bound or found.quality > kept.quality):
            kept = found
    return kept


def divergence(series: Sequence[Validation], margin: float) -> Validation | None:
    """Return the validation from which on the score says better and the judge worse; None where it is nowhere.

    Better and worse than the least toxic policy whose quality fell by no more than `margin`: the score is higher, and
    toxicity is higher by more than one standard error of the difference, or quality fell by more. It has to last to the
    end of the series, and for two validations at least, as one alone may be luck (Gao et al. 2022, over-optimisation).
    """
    good = _within(series, margin)
    least = min(good, key=lambda one: one.toxicity)

    def gamed(one: Validation) -> bool:
        worse = one.toxicity - least.toxicity > hypot(one.toxicity_error, least.toxicity_error)
        return one.score > least.score and (worse or one not in good)

    last = list(takewhile(gamed, reversed(series)))
    return last[-1] if len(last) > 1 else None


def _within(series: Sequence[Validation], margin: float) -> list[Validation]:
    return [one for one in series if one.quality >= series[0].quality - margin]


class BestCheckpoint:
    """Keeps the best policy in adapter/ and says which in checkpoint.json; `series` is every validation so far."""

    def __init__(self, folder: RunFolder, rl: RlConfig) -> None:
        self.folder, self.rl = folder, rl
        self.series: list[Validation] = []

    def offer(self, policy: Policy, found: Validation) -> bool:
        """Save the policy to adapter/ if it is the best so far; return whether it was. The start comes first."""
        margin = self.rl.quality_margin
        self.series.append(found)
        kept, parted = best_validation(self.series, margin), divergence(self.series, margin)
        if kept is found:
            with replace_folder(self.folder / "adapter") as temporary:
                policy.save(temporary)
        reason = f"{_REASON} {margin} below the start's"
        steps = {"kept_step": kept.step, "parted_step": parted and parted.step, "stopped_step": self.stopped_step}
        record = steps | {"reason": reason, "kept": asdict(kept), "start": asdict(self.series[0])}
        self.folder.write_json("checkpoint.json", record)
        return kept is found

    @property
    def stopped_step(self) -> int | None:
        """The step at which training ends early: `rl.patience` validations since the kept one. None: it does not."""
        if not self.series or self.rl.patience is None:
            return None
        since = len(self.series) - 1 - self.series.index(best_validation(self.series, self.rl.quality_margin))
        step = self.series[-1].step
        return step if since >= self.rl.patience and step < self.rl.steps else None

    def seen(self) -> list[dict[str, Any]]:
        """Return what decides on the next offer, as JSON holds it."""
        return [asdict(one) for one in self.series]

    def recall(self, seen: list[dict[str, Any]]) -> None:
        """Take up what `seen` returned before an interruption."""
        self.series = [Validation(**one) for one in seen]
