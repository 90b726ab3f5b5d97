"""What may be different when a run goes on, and how is that accounted for?

run.json says with which settings and on which machine the run was made so far, and what was changed on its way.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from accelerate import PartialState

from detoxrl.config.edit import config_to_json, flatten
from detoxrl.config.schema import Config
from detoxrl.errors import InputError, require
from detoxrl.evaluation.policies import NOTHING, Subjects
from detoxrl.rewards.function import RewardFunction
from detoxrl.runs import judges_of, local_sources, readers_of, run_scorer
from detoxrl.runtime import processes
from detoxrl.runtime.files import content_digest
from detoxrl.runtime.run_folder import STAGES, RunFolder, products_from

# The first stage that a setting, or a section of settings, has a part in.
_DECIDES = {
    "recipe": "prepare", "seed": "prepare", "data": "prepare", "policy.base": "prepare",
    "rl.validation_prompts": "prepare", "evaluation.prompts": "prepare", "policy": "sft", "sft": "sft",
    "reward": "sft", "generation": "sft", "rl": "train", "evaluation.primary_judge": "train",
    "evaluation.judge_label": "train", "evaluation": "evaluate",
}  # fmt: skip
Differences = dict[str, tuple[Any, Any]]


def new_record(config: Config, measures: dict[str, Any], changes: Sequence[Any] = ()) -> dict[str, Any]:
    """Return what run.json holds; `measures` are the subjects that a user named."""
    return {"settings": _settings(config), "machine": machine(config), "changes": [*changes], "measures": measures}


def machine(config: Config) -> dict[str, Any]:
    """Return what decides the last digits of a run beside its settings: threads, processor, versions, local parts."""
    device = PartialState().device
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    found = {
        "processes": processes.count(),
        "threads": torch.get_num_threads(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{' bf16' if bf16 else ''}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    found |= {name: version(name) for name in ("detoxrl", "torch", "transformers", "peft", "tokenizers", "numpy")}
    # The rows of data.source are in the run, and what only measures changes no step of it.
    parts = {name: path for name, path in local_sources(config).items() if name != "data.source"}
    return found | {
        f"content of {name}": content_digest(path) for name, path in parts.items() if _decides(name) != "evaluate"
    }


def resume_with(folder: RunFolder, asked: Config, given: RewardFunction | None, accept: bool) -> None:
    """Make the held folder one that goes on with `asked`.

    What no stage has used yet may change freely, and a measurement is made again. `rl` may change with `accept` when
    training has begun, and the machine at any time, which is recorded; nothing else may. The run's threads are taken
    over. Raises InputError for a change that is not allowed, naming each; nothing is written then.
    """
    account = _account(folder, asked)
    stopped_early = account["measures"]["names"] and "train" not in folder.finished()
    rule = f"was to measure {account['measures']['names'].get('after')} and was stopped before"
    require(not stopped_early, "run folder", str(folder.root), rule, "measure it again, with overwrite")
    was, now = account["settings"], _settings(asked)
    changed = {name: (was.get(name), now[name]) for name in now if was.get(name) != now[name]}
    stages = {name: _decides(name) for name in changed}
    used = {name for name, stage in stages.items() if stage != "evaluate" and folder.has_started(stage)}
    breaking = {name: pair for name, pair in changed.items() if name in used}
    if breaking:
        _refuse_fixed(folder, asked, breaking, stages)
    if changed or "report" not in folder.finished():
        breaking |= _machine_differences(account, asked)
    if breaking and not accept:
        _refuse(breaking)
    if changed and "prepare" in folder.finished():
        judges_of(asked)
        readers_of(asked, None if account["measures"]["texts"] else run_scorer(folder, asked, given))
    left = [stage for stage in STAGES if stage not in folder.finished() or stage in stages.values()]
    if changed:
        folder.reopen(left[0])
        folder.discard(products_from("evaluate"))
        folder.write("config.json", config_to_json(asked))
    if changed or breaking:
        changes = account["changes"] + _records(folder, left[0], breaking)
        folder.write_json("run.json", new_record(asked, account["measures"], changes))


def also_measure(folder: RunFolder, config: Config, subjects: Subjects) -> None:
    """Let a held run be measured beside further policies too, from now on."""
    account = _account(folder, config)
    policies = {**account["measures"]["policies"], **subjects.policies}
    folder.write_json("run.json", account | {"measures": account["measures"] | {"policies": policies}})


def restart_stage(folder: RunFolder, config: Config, stage: str) -> None:
    """Account for a stage that is made anew from its beginning: with this config, here, on the run's threads."""
    account = _account(folder, config)
    changes = [one for one in account["changes"] if STAGES.index(one["stage"]) < STAGES.index(stage)]
    changes += _records(folder, stage, _machine_differences(account, config))
    folder.write_json("run.json", new_record(config, account["measures"], changes))


def _decides(name: str) -> str:
    return _DECIDES.get(name) or _DECIDES[name.partition(".")[0]]


def _settings(config: Config) -> dict[str, Any]:
    return dict(json.loads(json.dumps(flatten(asdict(config)))))  # as run.json gives them back


def _account(folder: RunFolder, config: Config) -> dict[str, Any]:
    if not (folder / "run.json").is_file():  # nothing is known, so any machine is another one
        return {"settings": _settings(config), "machine": {}, "changes": [], "measures": asdict(NOTHING)}
    return dict(folder.read_json("run.json"))


def _machine_differences(account: dict[str, Any], config: Config) -> Differences:
    was = {"processes": 1} | account["machine"]
    if was["processes"] == processes.count():  # others share the cores otherwise
        threads = was.get("threads", torch.get_num_threads())
        torch.set_num_threads(threads)
        processes.tell("threads", threads)
    now = machine(config)
    return {name: (was.get(name), now.get(name)) for name in {**was, **now} if was.get(name) != now.get(name)}


def _refuse_fixed(folder: RunFolder, asked: Config, breaking: Differences, stages: dict[str, str]) -> None:
    remedy = "leave it out (--resume --run-dir DIR goes on as it was), or begin anew with --overwrite"
    for name, (was, now) in breaking.items():
        fixed = stages[name] != "train" or not name.startswith("rl.")
        require(not fixed, name, now, f"differs from the run's {was!r}, and {stages[name]} was begun with that", remedy)
    (name, (_, now)), made = next(iter(breaking.items())), _steps_made(folder)
    gone = made == 0 and "train" in folder.finished()
    require(not gone, name, now, "needs a checkpoint to go on from, and there is none", "begin anew with --overwrite")
    rule, remedy = f"comes too late: the run has made {made} steps", f"--rl.steps {2 * made} for one"
    require(asked.rl.steps > made, name, now, rule, f"leave it out, or ask for more steps, {remedy}")


def _refuse(breaking: Differences) -> None:
    (name, (was, now)), *others = breaking.items()
    told = ", ".join(f"{other} = {now!r} (was {was!r})" for other, (was, now) in others)
    also = f"; different too: {told}" if told else ""
    rule = f"differs from the run's {was!r}, so it would not end as if it had never stopped{also}"
    raise InputError(name, now, rule, "add --accept-changes to go on all the same, and have it recorded")


def _steps_made(folder: RunFolder) -> int:
    local_sources = (folder / "checkpoints/train").glob(f"step-{'[0-9]' * 8}")
    return max((int(place.name.partition("-")[2]) for place in local_sources), default=0)


def _records(folder: RunFolder, stage: str, breaking: Differences) -> list[dict[str, Any]]:
    changes = {name: [*pair] for name, pair in breaking.items()}
    return [{"stage": stage, "step": _steps_made(folder), "changes": changes}] if changes else []
