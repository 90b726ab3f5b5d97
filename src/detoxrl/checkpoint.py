"""Which policy does training keep?"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from detoxrl.policy.encoder_decoder import EncoderDecoderPolicy
from detoxrl.tracking import RunFolder


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How a policy did on the validation prompts."""

    step: int
    toxicity: float
    """Mean by the primary judge, [0, 1]."""
    quality: float
    """Facts kept, or ROUGE-L without facts, [0, 1]."""
    length: float
    """Mean words per response."""


class BestCheckpoint:
    """Keeps the policy that is least toxic on validation among those whose quality stayed within the margin."""

    def __init__(self, folder: RunFolder, margin: float) -> None:
        self.folder = folder
        self.margin = margin
        self.start: Validation | None = None
        self.best: Validation | None = None

    def offer(self, policy: EncoderDecoderPolicy, found: Validation) -> bool:
        """Save the policy to adapter/ if it is the best so far; return whether it was. The start comes first."""
        self.start = self.start or found
        if found.quality < self.start.quality - self.margin:
            return False
        if self.best is not None and found.toxicity >= self.best.toxicity:
            return False
        self.best = found
        with self.folder.replacing("adapter") as temporary:
            policy.save(temporary)
        reason = f"least toxic on validation with quality no more than {self.margin} below the start"
        record = {"kept_step": found.step, "reason": reason, "kept": asdict(found), "start": asdict(self.start)}
        self.folder.write_json("checkpoint.json", record)
        return True
