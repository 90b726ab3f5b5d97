"""Which policy does training keep, and from what can it go on?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from detoxrl.policy.policy import Policy
from detoxrl.tracking import RunFolder, filling, reading


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

    def offer(self, policy: Policy, found: Validation) -> bool:
        """Save the policy to adapter/ if it is the best so far; return whether it was. The start comes first."""
        self.start = self.start or found
        if not self._better(found, self.start.quality - self.margin):
            return False
        self.kept = found
        with filling(self.folder / "adapter") as temporary:
            policy.save(temporary)
        reason = (
            "the best quality among policies whose validation toxicity is within one standard error of the least seen, "
            f"and whose quality is at most {self.margin} below the start's"
        )
        record = {"kept_step": found.step, "reason": reason, "kept": asdict(found), "start": asdict(self.start)}
        self.folder.write_json("checkpoint.json", record)
        return True

    def seen(self) -> dict[str, Validation | None]:
        """Return what decides on the next offer."""
        return {"start": self.start, "least_toxic": self.least_toxic, "kept": self.kept}

    def recall(self, seen: dict[str, Validation | None]) -> None:
        """Take up what `seen` returned before an interruption."""
        self.start, self.least_toxic, self.kept = seen["start"], seen["least_toxic"], seen["kept"]

    def _better(self, found: Validation, quality_bound: float) -> bool:
        if found.quality < quality_bound:
            return False
        if self.least_toxic is None or found.toxicity < self.least_toxic.toxicity:
            self.least_toxic = found
        bound = self.least_toxic.toxicity + self.least_toxic.toxicity_error
        if self.kept is None or self.kept.toxicity > bound:
            return found.toxicity <= bound
        return found.toxicity <= bound and found.quality > self.kept.quality


def save_state(
    folder: RunFolder,
    policy: Policy,
    optimizer: Any,
    seen: dict[str, Validation | None],
    step: int,
    kl_coef: float,
) -> None:
    """Write to state/ all that step `step` depends on; `seen` is what `BestCheckpoint.seen` says before it."""
    moments = {
        f"{number}/{name}": tensor.contiguous()
        for number, of_one in optimizer.state_dict()["state"].items()
        for name, tensor in of_one.items()
    }
    best = {name: found and asdict(found) for name, found in seen.items()}
    with filling(folder / "state") as temporary:
        policy.save(temporary)
        save_file(moments, temporary / "optimizer.safetensors")
        RunFolder(temporary).write_json("state.json", {"step": step, "kl_coef": kl_coef, "best": best})


def load_state(folder: RunFolder, policy: Policy, optimizer: Any, best: BestCheckpoint) -> tuple[int, float] | None:
    """Put back what `save_state` wrote and return the step to go on with and its kl_coef; None where there is none.

    Raises StorageError when a file of it is torn.
    """
    if not (folder / "state").is_dir():
        return None
    with reading(folder / "state"):
        policy.load(folder / "state")
        moments: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, tensor in load_file(folder / "state" / "optimizer.safetensors").items():
            number, _, name = key.partition("/")
            moments[int(number)][name] = tensor
        optimizer.load_state_dict({"state": dict(moments), "param_groups": optimizer.state_dict()["param_groups"]})
        state = folder.read_json("state/state.json")
        best.recall({name: found and Validation(**found) for name, found in state["best"].items()})
        for name in ("metrics.jsonl", "validation.jsonl", "rollouts.jsonl"):
            folder.keep_before(name, state["step"])
    return state["step"], state["kl_coef"]
