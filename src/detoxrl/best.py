"""Which policy does training keep?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from detoxrl.policy.policy import Policy
from detoxrl.storage import filling
from detoxrl.tracking import RunFolder


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
        self.folder, self.margin = folder, margin
        self._found: dict[str, Validation] = {}

    def offer(self, policy: Policy, found: Validation) -> bool:
        """Save the policy to adapter/ if it is the best so far; return whether it was. The start comes first."""
        start = self._found.setdefault("start", found)
        if found.quality < start.quality - self.margin or not self._better(found):
            return False
        self._found["kept"] = found
        with filling(self.folder / "adapter") as temporary:
            policy.save(temporary)
        reason = (
            "the best quality among policies whose validation toxicity is within one standard error of the least seen, "
            f"and whose quality is at most {self.margin} below the start's"
        )
        record = {"kept_step": found.step, "reason": reason, "kept": asdict(found), "start": asdict(start)}
        self.folder.write_json("checkpoint.json", record)
        return True

    def seen(self) -> dict[str, dict[str, Any]]:
        """Return what decides on the next offer, as JSON holds it."""
        return {name: asdict(one) for name, one in self._found.items()}

    def recall(self, seen: dict[str, dict[str, Any]]) -> None:
        """Take up what `seen` returned before an interruption."""
        self._found = {name: Validation(**one) for name, one in seen.items()}

    def _better(self, found: Validation) -> bool:
        least, kept = self._found.setdefault("least_toxic", found), self._found.get("kept")
        if found.toxicity < least.toxicity:
            self._found["least_toxic"] = least = found
        bound = least.toxicity + least.toxicity_error
        return found.toxicity <= bound and (kept is None or kept.toxicity > bound or found.quality > kept.quality)
