"""What may differ when a run is resumed, and how is that recorded?

run.json holds the settings and the machine with which the run was made so far, and what was changed on the way.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from detoxrl.config.algorithms import ALGORITHM_TRAITS
from detoxrl.config.edit import config_to_json, flatten
from detoxrl.config.schema import Config
from detoxrl.config.sources import local_sources
from detoxrl.errors import InputError, require
from detoxrl.evaluation.subjects import NO_SUBJECTS, Subjects
from detoxrl.models.kernels import Kernels, kernels, use_kernels
from detoxrl.runs import Run
from detoxrl.runtime.files import content_digest
from detoxrl.runtime.run_folder import STAGES, RunFolder, products_from
from detoxrl.runtime.world import World, current_world

# The first stage that uses a setting, or a section of settings.
_FIRST_STAGE = {
    "recipe": "prepare",
    "seed": "prepare",
    "data": "prepare",
    "policy.base": "prepare",
    "rl.validation_prompts": "prepare",
    "evaluation.prompts": "prepare",
    "reward.classifier": "prepare",
    "reward.encoder": "prepare",
    "reward.terms": "prepare",
    "policy": "sft",
    "sft": "sft",
    "reward": "sft",
    "generation": "sft",
    "rl": "train",
    "evaluation.primary_judge": "train",
    "evaluation.judge_label": "train",
    "evaluation": "evaluate",
}
_HAD_ONEDNN = torch.backends.cpu.get_cpu_capability() == "AVX512"
_KERNELS_OF_EARLIER_VERSIONS = asdict(Kernels(onednn=_HAD_ONEDNN, packed=_HAD_ONEDNN, bf16=True))
_VERSIONED = ("detoxrl", "torch", "transformers", "peft", "tokenizers", "numpy")

Differences = dict[str, tuple[Any, Any]]
"""By setting or property of the machine: the run's value, and the value now."""


def new_record(config: Config, measures: dict[str, Any], changes: Sequence[Any] = ()) -> dict[str, Any]:
    """Return what run.json holds; `measures` are the subjects that a user named."""
    return {
        "settings": _settings(config),
        "machine": machine(config, current_world()),
        "changes": [*changes],
        "measures": measures,
    }


def machine(config: Config, world: World) -> dict[str, Any]:
    """Return what decides the last digits of a run beside its settings: threads, kernels, versions, local parts."""
    device = world.device
    properties: dict[str, Any] = {
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "kernels": asdict(kernels()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    for package in _VERSIONED:
        properties[package] = version(package)

    for setting, path in local_sources(config).items():
        # What `data` names is in the run's rows, and what only measures changes no step of it.
        if not setting.startswith("data.") and _first_stage(setting) != "evaluate":
            properties[f"content of {setting}"] = content_digest(path)
    return properties


def _processor() -> str:
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{processor} bf16" if has_bf16 else processor


def resume_with(run: Run, accept_changes: bool) -> None:
    """Make the locked folder of a run continue with the run's config.

    A setting that no stage has used yet may change freely, and a measurement is made again. With `accept_changes`,
    settings of `rl` may change once training has begun, and the machine at any time; both are recorded. Nothing else
    may change. The run's number of threads is restored. Raises InputError for a change that is not allowed, naming each
    one; nothing is written then.
    """
    folder = run.folder
    config = run.config
    record = _record(folder, config)
    _require_whole_measurement(folder, record)

    changed = _changed_settings(record, config)
    stages = {name: _first_stage(name) for name in changed}
    breaking = {name: values for name, values in changed.items() if _is_used(folder, stages[name])}
    if breaking:
        _require_changeable(folder, config, breaking, stages)
    if changed or "report" not in folder.finished():
        breaking.update(_machine_differences(record, config))
    if breaking and not accept_changes:
        _refuse(breaking)

    if changed and "prepare" in folder.finished():
        run.load_measures()
        if not record["measures"]["texts"]:
            run.load_reward()

    remaining = [stage for stage in STAGES if stage not in folder.finished() or stage in stages.values()]
    if changed:
        folder.reopen(remaining[0])
        folder.discard(products_from("evaluate"))
        folder.write("config.json", config_to_json(config))
    if changed or breaking:
        changes = record["changes"] + _change_records(folder, remaining[0], breaking)
        folder.write_json("run.json", new_record(config, record["measures"], changes))


def also_measure(folder: RunFolder, config: Config, subjects: Subjects) -> None:
    """Let the run of a locked folder be measured beside further policies from now on."""
    record = _record(folder, config)
    policies = {**record["measures"]["policies"], **subjects.policies}
    record["measures"] = {**record["measures"], "policies": policies}
    folder.write_json("run.json", record)


def restart_stage(folder: RunFolder, config: Config, stage: str) -> None:
    """Record that a stage is made again from its beginning, with this config, on this machine."""
    record = _record(folder, config)
    position = STAGES.index(stage)
    earlier = [change for change in record["changes"] if STAGES.index(change["stage"]) < position]
    changes = earlier + _change_records(folder, stage, _machine_differences(record, config))
    folder.write_json("run.json", new_record(config, record["measures"], changes))


def _first_stage(setting: str) -> str:
    section = setting.partition(".")[0]
    return _FIRST_STAGE.get(setting) or _FIRST_STAGE[section]


def _is_used(folder: RunFolder, stage: str) -> bool:
    """Return whether settings of a stage have been used, so that a change breaks the run. A measurement is remade."""
    return stage != "evaluate" and folder.has_started(stage)


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings as JSON gives them back."""
    return dict(json.loads(json.dumps(flatten(asdict(config)))))


def _record(folder: RunFolder, config: Config) -> dict[str, Any]:
    if not (folder / "run.json").is_file():
        # Nothing is known about the machine, so any machine is a different one.
        return {"settings": _settings(config), "machine": {}, "changes": [], "measures": asdict(NO_SUBJECTS)}
    return dict(folder.read_json("run.json"))


def _require_whole_measurement(folder: RunFolder, record: dict[str, Any]) -> None:
    """Raise InputError when the folder is of a measurement that was stopped before it was set up."""
    names = record["measures"]["names"]
    stopped_early = names and "train" not in folder.finished()
    rule = f"was to measure {names.get('after')} and was stopped before it began"
    require(not stopped_early, "run folder", str(folder.root), rule, "measure it again, with overwrite")


def _changed_settings(record: dict[str, Any], config: Config) -> Differences:
    # Runs of earlier versions lack settings that came later; they ran as the defaults say.
    before = {**_settings(Config(recipe=config.recipe)), **record["settings"]}
    now = _settings(config)
    return {name: (before[name], value) for name, value in now.items() if before[name] != value}


def _machine_differences(record: dict[str, Any], config: Config) -> Differences:
    """Restore the run's number of threads and its kernels, and return what else differs on this machine."""
    before = {"processes": 1, **record["machine"]}
    if record["machine"]:
        before.setdefault("kernels", _KERNELS_OF_EARLIER_VERSIONS)
    before.pop("sharded", None)  # Runs of earlier versions say whether FSDP sharded their base.
    world = current_world()
    if before["processes"] == world.size:  # Another number of processes shares the cores differently.
        world.set_everywhere(torch.set_num_threads, before.get("threads", torch.get_num_threads()))
    if before.get("processor") == _processor():
        world.set_everywhere(use_kernels, Kernels(**before["kernels"]))

    now = machine(config, world)
    return {name: (before.get(name), now.get(name)) for name in {**before, **now} if before.get(name) != now.get(name)}


def _require_changeable(folder: RunFolder, config: Config, breaking: Differences, stages: dict[str, str]) -> None:
    """Raise InputError when a setting that was used may not change even with --accept-changes."""
    remedy = "leave it out (--resume --run-dir DIR keeps it), or start over with --overwrite"
    for name, (before, now) in breaking.items():
        is_changeable = stages[name] == "train" and name.startswith("rl.")
        rule = f"differs from the run's {before!r}, and stage {stages[name]} has started with that"
        require(is_changeable, name, now, rule, remedy)
        if name == "rl.algorithm":
            rule = f"differs from the run's {before!r}, and only one of the two has a critic"
            require(ALGORITHM_TRAITS[before].has_critic == ALGORITHM_TRAITS[now].has_critic, name, now, rule, remedy)

    name, (_, now) = next(iter(breaking.items()))
    steps_made = _steps_made(folder)
    has_checkpoint = steps_made > 0 or "train" not in folder.finished()
    rule = "needs a checkpoint to resume from, and there is none"
    require(has_checkpoint, name, now, rule, "start over with --overwrite")

    rule = f"comes too late: the run has made {steps_made} steps"
    remedy = f"leave it out, or ask for more steps, for example --rl.steps {2 * steps_made}"
    require(config.rl.steps > steps_made, name, now, rule, remedy)


def _refuse(breaking: Differences) -> None:
    """Raise InputError for changes that --accept-changes would allow."""
    (name, (before, now)), *others = breaking.items()
    rule = f"differs from the run's {before!r}, so resuming would not reproduce an uninterrupted run"
    if others:
        also = ", ".join(f"{other} = {value!r} (was {earlier!r})" for other, (earlier, value) in others)
        rule = f"{rule}; also different: {also}"
    raise InputError(name, now, rule, "add --accept-changes to resume anyway and have it recorded")


def _steps_made(folder: RunFolder) -> int:
    checkpoints = (folder / "checkpoints/train").glob(f"step-{'[0-9]' * 8}")
    steps = [int(path.name.removeprefix("step-")) for path in checkpoints]
    return max(steps, default=0)


def _change_records(folder: RunFolder, stage: str, breaking: Differences) -> list[dict[str, Any]]:
    if not breaking:
        return []
    changes = {name: [before, now] for name, (before, now) in breaking.items()}
    return [{"stage": stage, "step": _steps_made(folder), "changes": changes}]
