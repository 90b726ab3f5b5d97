"""What may be different when a run goes on, and what would then not be the run it was?"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from accelerate import PartialState

from detoxrl.config import Config
from detoxrl.errors import InputError, require
from detoxrl.parts import places
from detoxrl.settings import config_to_json, flatten
from detoxrl.tracking import STAGES, RunFolder

# The first stage that a setting, or a section of settings, has a part in.
_DECIDES = {
    "recipe": "prepare", "seed": "prepare", "data": "prepare", "policy.base": "prepare",
    "rl.validation_prompts": "prepare", "evaluation.prompts": "prepare", "policy": "sft", "sft": "sft",
    "reward": "train", "generation": "train", "rl": "train", "evaluation.primary_judge": "train",
    "evaluation.judge_label": "train", "evaluation": "evaluate",
}  # fmt: skip
Differences = dict[str, tuple[Any, Any]]


def machine(config: Config) -> dict[str, Any]:
    """Return what else than the config decides the last digits of a run: threads, processor, versions, reward file."""
    device = PartialState().device
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    found = {
        "threads": torch.get_num_threads(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{' bf16' if bf16 else ''}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    found |= {name: version(name) for name in ("detoxrl", "torch", "transformers", "peft", "tokenizers", "numpy")}
    if file := places(config).get("reward.function"):
        found["content of reward.function"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def take_up(folder: RunFolder, stored: Config, asked: Config, accept: bool) -> None:
    """Make the held folder one that goes on with `asked`, which takes the place of the `stored` config.

    What no stage has used yet may change freely, and a measurement is made again. What training has used may change
    with `accept`, and is recorded; what the data and the warm start were made from may not. The run's threads are
    taken over. Raises InputError for a change that is not allowed, naming each.
    """
    was, now = flatten(asdict(stored)), flatten(asdict(asked))
    changed = {name: (was[name], now[name]) for name in now if was[name] != now[name]}
    stages = {name: _DECIDES.get(name) or _DECIDES[name.partition(".")[0]] for name in changed}
    for name, stage in stages.items():
        rule = f"differs from the run's {was[name]!r}, and {stage} was begun with that"
        fixed = stage in ("prepare", "sft") and folder.begun(stage)
        require(not fixed, name, now[name], rule, "begin anew with --overwrite, or name another --run-dir")
    breaking = {name: pair for name, pair in changed.items() if stages[name] == "train" and folder.begun("train")}
    made = _steps_made(folder)
    if breaking and asked.rl.steps <= made:
        name, rule = next(iter(breaking)), f"comes too late: the run has made {made} steps"
        raise InputError(name, now[name], rule, f"ask for more, --rl.steps {2 * made} for one")
    if changed or "report" not in folder.finished():
        breaking |= _machine_differences(folder, asked, accept)
    if breaking and not accept:
        _refuse(breaking)
    left = [stage for stage in STAGES if stage not in folder.finished() or stage in stages.values()]
    if breaking:
        _record(folder, asked, left[0], breaking)
    if changed:
        folder.reopen(left[0])
        folder.discard("responses.jsonl")
        folder.write("config.json", config_to_json(asked))


def _machine_differences(folder: RunFolder, config: Config, accept: bool) -> Differences:
    was = folder.machine()
    if not accept:
        torch.set_num_threads(was["threads"])
    now = machine(config)
    return {name: (was.get(name), now.get(name)) for name in {**was, **now} if was.get(name) != now.get(name)}


def _refuse(breaking: Differences) -> None:
    name, (was, now) = next(iter(breaking.items()))
    others = [f"{other} = {values[1]!r} (was {values[0]!r})" for other, values in list(breaking.items())[1:]]
    rule = f"differs from the run's {was!r}, so it would not end as if it had never stopped"
    also = f" (so do {', '.join(others)})" if others else ""
    raise InputError(name, now, rule + also, "add --accept-changes to go on all the same, and have it recorded")


def _steps_made(folder: RunFolder) -> int:
    return max(
        (int(place.name.partition("-")[2]) for place in (folder / "checkpoints/train").glob("step-*")), default=0
    )


def _record(folder: RunFolder, config: Config, stage: str, breaking: Differences) -> None:
    """Append what changed before `stage` went on to changes.jsonl, which the report reads, and note the machine."""
    changes = {name: list(pair) for name, pair in breaking.items()}
    record = {"stage": stage, "step": _steps_made(folder), "changes": changes}
    if record not in folder.whole_lines("changes.jsonl"):  # a kill may have come between this line and the next
        folder.append("changes.jsonl", record)
    folder.write_json("machine.json", machine(config))
