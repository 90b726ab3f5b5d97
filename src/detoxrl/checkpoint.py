"""Which policy does training keep?"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from detoxrl.policy.encoder_decoder import EncoderDecoderPolicy
from detoxrl.tracking import RunFolder, filling


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How a policy did on the validation prompts before step `step`."""

    step: int
    toxicity: float
    """Mean by the primary judge, [0, 1]."""
    toxicity_error: float
    """Standard error of that mean."""
    quality: float
    """Facts kept, or ROUGE-L without facts, [0, 1]."""
    length: float
    """Mean words per response."""


class BestCheckpoint:
    """Keeps the least toxic policy on validation, within its error, among those whose quality stayed in the margin.

    Policies within one standard error of the least toxic one seen are as good as it (the one-standard-error rule,
    Breiman et al. 1984, section 3.4.3); of these the one with the higher quality is kept.
    """

    def __init__(self, folder: RunFolder, margin: float) -> None:
        self.folder = folder
        self.margin = margin
        self.start: Validation | None = None
        self.least_toxic: Validation | None = None
        self.kept: Validation | None = None

    def offer(self, policy: EncoderDecoderPolicy, found: Validation) -> bool:
        """Save the policy to adapter/ if it is the best so far; return whether it was. The start comes first."""
        self.start = self.start or found
        if not self._better(found, self.start.quality - self.margin):
            return False
        self.kept = found
        with filling(self.folder / "adapter") as temporary:
            policy.save(temporary)
        reason = f"least toxic on validation within one standard error, quality at most {self.margin} below the start"
        record = {"kept_step": found.step, "reason": reason, "kept": asdict(found), "start": asdict(self.start)}
        self.folder.write_json("checkpoint.json", record)
        return True

    def _better(self, found: Validation, quality_bound: float) -> bool:
        if found.quality < quality_bound:
            return False
        if self.least_toxic is None or found.toxicity < self.least_toxic.toxicity:
            self.least_toxic = found
        bound = self.least_toxic.toxicity + self.least_toxic.toxicity_error
        if self.kept is None or self.kept.toxicity > bound:
            return found.toxicity <= bound
        return found.toxicity <= bound and found.quality > self.kept.quality
