"""Can a classifier be fitted to this source, and where does it go?

It is known before anything slow is imported: no torch is needed for the answer.
"""

import hashlib
import json
import os
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from detoxrl.config.edit import fit_config
from detoxrl.config.fit import FitConfig
from detoxrl.data.held_out import Division, divide
from detoxrl.data.labelled import Labelled, read_labelled
from detoxrl.errors import InputError, require
from detoxrl.models.files import read_settings, require_model_files
from detoxrl.runtime.console import status
from detoxrl.runtime.hub import config_folder, is_hub_id, pin_revision, require_source

RESULT = "fit.json"
"""The file of a fitted classifier that holds its settings and results."""
SETTINGS = "settings.json"
"""The file of an unfinished fit from which it resumes."""
_OUT = "--out"
_ENCODER = "encoder"


@dataclass(frozen=True)
class FitPlan:
    """A fit whose settings, texts and labels are known to be usable, and the folder that it makes."""

    config: FitConfig
    target: Path
    overwrite: bool
    labelled: Labelled
    division: Division

    @property
    def work(self) -> Path:
        """The folder that holds the fit's state until it is finished."""
        return unfinished_folder(self.target)

    @property
    def digest(self) -> str:
        """Hexadecimal digits that identify the examples and their order."""
        return hashlib.sha256(repr(self.labelled.examples).encode()).hexdigest()


def unfinished_folder(target: Path) -> Path:
    """Return the folder in which a fit of `target` keeps its state until it is finished."""
    return target.with_name(f"{target.name}.unfinished")


def planned_fit(config: FitConfig, target: Path, overwrite: bool) -> FitPlan:
    """Return the plan of a new fit, with a commit behind every hub id. Raises InputError; writes nothing."""
    _require_usable(target, overwrite)
    has_state = (unfinished_folder(target) / SETTINGS).is_file()
    remedy = f"run `{_resume_command(target)}`, or add --overwrite to start anew"
    require(overwrite or not has_state, _OUT, str(target), "has an unfinished fit", remedy)

    config = _with_commits(config)
    _require_apart(config, target)
    return _read(config, target, overwrite)


def resumed_fit(target: Path) -> FitPlan:
    """Return the plan of the unfinished fit of `target`.

    Raises InputError when there is none, when its texts or settings changed, and when its folder was made meanwhile.
    """
    path = unfinished_folder(target) / SETTINGS
    require(path.is_file(), _OUT, str(target), "has no unfinished fit", "leave --resume out to start one")

    stored = json.loads(path.read_text(encoding="utf-8"))
    _require_usable(target, stored["overwrite"], _how_to_go_on(target))
    config = fit_config(stored["settings"], f"correct it in {path}")
    plan = _read(_with_commits(config), target, stored["overwrite"])
    rule = "has changed since the fit was stopped"
    require(plan.digest == stored["digest"], "source", config.source, rule, "restore it, or start anew: --overwrite")

    rule = f"has an unfinished fit whose {SETTINGS} has other settings than this version of detoxrl reads"
    require(is_state_of(plan), _OUT, str(target), rule, "resume it with the version that began it, or start anew")
    return plan


def require_still_usable(plan: FitPlan) -> None:
    """Raise InputError, which says how to go on, if what the plan may not replace was put at its target meanwhile."""
    _require_usable(plan.target, plan.overwrite, _how_to_go_on(plan.target))


def is_state_of(plan: FitPlan) -> bool:
    """Return whether the state in the work folder belongs to this plan, so that a plan that resumes keeps it."""
    path = plan.work / SETTINGS
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == json.loads(settings_to_json(plan))


def settings_to_json(plan: FitPlan) -> str:
    """Return what `resumed_fit` reads, with absolute paths."""
    config = plan.config
    absolute = replace(config, source=_absolute(config.source), encoder=_absolute(config.encoder))
    content = {"settings": asdict(absolute), "overwrite": plan.overwrite, "digest": plan.digest}
    return json.dumps(content, indent=2) + "\n"


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


def how_to_resume(target: Path) -> str:
    """Return what a stopped fit left behind, and the command that resumes it."""
    work = unfinished_folder(target)
    if not (work / SETTINGS).is_file():
        return "nothing was written"
    return f"{work} keeps its state; resume with `{_resume_command(target)}`"


def _resume_command(target: Path) -> str:
    return f"detoxrl fit --resume --out {shlex.quote(str(target))}"


def _how_to_go_on(target: Path) -> str:
    return f"move it away and run `{_resume_command(target)}`; the fit keeps its state"


def _read(config: FitConfig, target: Path, overwrite: bool) -> FitPlan:
    with status(f"reading {config.source}"):
        labelled = read_labelled(config)
        division = divide(labelled, config)
    return FitPlan(config, target, overwrite, labelled, division)


def _with_commits(config: FitConfig) -> FitConfig:
    """Return the config with a commit behind every hub id, once its encoder is known to have a config.

    Local paths are looked at first.
    """
    for field in ("source", _ENCODER):
        require_source(getattr(config, field), field)
    _require_encoder(config.encoder)
    return replace(config, encoder=pin_revision(config.encoder, _ENCODER), source=pin_revision(config.source, "source"))


def _require_encoder(source: str) -> None:
    """Raise InputError unless the folder or hub id of an encoder has a config, and a folder weights and a tokenizer."""
    folder = config_folder(source, _ENCODER)
    require(folder.is_dir(), _ENCODER, source, "is a file", "give the folder or hub id of an encoder")
    read_settings(folder, "config.json", _ENCODER, source)
    if not is_hub_id(source):
        require_model_files(folder, _ENCODER, source)


def _require_apart(config: FitConfig, target: Path) -> None:
    """Raise InputError if the new folder would replace the encoder or the source, of which a LoRA needs the first."""
    folder = target.resolve()
    for field, source in ((_ENCODER, config.encoder), ("source", config.source)):
        path = Path(source).resolve()
        is_inside = Path(source).exists() and (path == folder or folder in path.parents)
        require(not is_inside, _OUT, str(target), f"would replace {field} = {source!r}", "name another folder")


def _require_usable(target: Path, overwrite: bool, remedy: str | None = None) -> None:
    """Raise InputError unless `target` can be created, or is a fitted classifier that may be replaced.

    `remedy` is what helps against a folder that exists, if not another name or --overwrite.
    """
    require(target.name not in ("", ".."), _OUT, str(target), "names no folder of its own", "name a new folder")
    if target.exists():
        is_fit = (target / RESULT).is_file()
        rename = remedy or "name a new folder; nothing was deleted"
        require(is_fit, _OUT, str(target), "already exists and is not a fitted classifier", rename)
        allow = remedy or "add --overwrite, or name another folder"
        require(overwrite, _OUT, str(target), "already exists", allow)

    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(_OUT, str(target), f"cannot be created: {parent} is not writable", "name another folder")
