"""Which reward, judge and policy does a config name?"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import huggingface_hub
import transformers
from accelerate import PartialState

from detoxrl.config import Config, without_revision
from detoxrl.data.rows import Row, read_rows
from detoxrl.errors import require
from detoxrl.evaluation.judges import Judge, classifier_judge, load_judge
from detoxrl.hub import is_id, pinned
from detoxrl.policy.adapters import start_of
from detoxrl.reward_training import LABELS
from detoxrl.rewards.classifier import CIVIL_PROBE, TOXIC_PROBE, load_classifier
from detoxrl.rewards.function import RewardFunction, checked, function_name, load_function
from detoxrl.rewards.shaping import Reward
from detoxrl.settings import changed, flatten
from detoxrl.storage import reading
from detoxrl.tracking import RunFolder

# Settings that may name something on disk, and the words that never do.
_PLACES = ("data.source", "policy.base", "policy.adapter", "reward.classifier", "evaluation.primary_judge")
_RESERVED = ("embedded", "scratch", "alt-profanity-check")


def _quieten_libraries() -> None:
    # Progress bars and notices of others would tear ours apart; their errors still come through.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


_quieten_libraries()


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What training maximises, and the same model as a judge where it is a classifier (not an independent one)."""

    reward: Reward
    judge: Judge | None


def scorer(config: Config, embedded: Path | None, given: RewardFunction | None) -> Scorer | None:
    """Return the reward, tried on a few texts: a function that was given or named, else a classifier.

    `embedded` is where the embedded classifier lies; before it is trained there is none, and None comes back.
    Raises InputError when it does not fit.
    """
    name = config.reward.function
    if given is not None or name is not None:
        reward = checked(load_function(str(name)) if given is None else given, str(name))
        reward(["", "", ""], [CIVIL_PROBE, TOXIC_PROBE, ""])
        return Scorer(reward=reward, judge=None)
    source = str(embedded) if config.reward.classifier == "embedded" else config.reward.classifier
    labels = label_settings(config, "reward.classifier")
    if config.reward.classifier == "embedded" and embedded is None:
        for (setting, label), right in zip(labels.items(), reversed(LABELS), strict=False):
            rule = "is not what the embedded classifier calls it"
            require(label.lower() == right, setting, label, rule, f"say {right}")
        return None
    kind = config.reward.score
    classifier = load_classifier(source, "reward.classifier", labels, PartialState().device, kind)
    return Scorer(reward=classifier.score, judge=classifier_judge(classifier))


def label_settings(config: Config, field: str) -> dict[str, str]:
    """Return the labels of the classifier that the setting `field` names, by their settings, the toxic one first."""
    if field == "evaluation.primary_judge":
        return {"evaluation.judge_label": config.evaluation.judge_label}
    good = {"reward.good_label": config.reward.good_label} if config.reward.good_label else {}
    return {"reward.toxic_label": config.reward.toxic_label} | good


def run_scorer(folder: RunFolder, config: Config, given: RewardFunction | None) -> Scorer:
    """Return the reward of a prepared run."""
    wanted = config.reward.function is None and config.reward.classifier == "embedded"
    found = scorer(config, folder.need("reward", "prepare") if wanted else None, given)
    assert found is not None
    return found


def judge_of(config: Config) -> Judge:
    """Return the primary judge."""
    return load_judge(config.evaluation, PartialState().device)


def judge_name(config: Config) -> str:
    """Return what the primary judge is called in results: a folder's name without the path to it, or the hub id."""
    path = Path(without_revision(config.evaluation.primary_judge))
    return path.name if path.is_absolute() else str(path)


def rows_of(folder: RunFolder, split: str) -> list[Row]:
    """Return the rows of a split of a prepared run."""
    path = folder.need(f"data/{split}.jsonl", "prepare")
    with reading(path, "remove seconds.json, and --resume makes the rows again"):
        return read_rows(path)


def base_and_start(folder: RunFolder, config: Config) -> tuple[str, Path | None]:
    """Return the policy's base and the adapter it starts from: what sft made, else what the config names."""
    own_base, own_start = folder / "base", folder / "start"
    if config.sft.steps > 0:
        folder.need("base" if config.sft.full_weights else "start", "sft")
    base = str(own_base.resolve()) if own_base.is_dir() else config.policy.base
    if own_start.is_dir():
        return base, own_start
    return base, start_of(config.policy)


def with_function(config: Config, given: RewardFunction | None) -> Config:
    """Return the config with the name of a reward that was given in Python."""
    if given is None:
        return config
    return replace(config, reward=replace(config.reward, function=function_name(given)))


def sources(config: Config) -> dict[str, str]:
    """Return the settings that name data or a model which the run reads, with the path or hub id."""
    flat, unused = flatten(asdict(config)), ["reward.classifier"] if config.reward.function else []
    return {name: flat[name] for name in _PLACES if name not in unused and flat[name] not in (None, *_RESERVED)}


def places(config: Config) -> dict[str, Path]:
    """Return the settings that name something on disk, with its path."""
    file = (config.reward.function or "").rpartition(":")[0]
    named = sources(config) | ({"reward.function": file} if file else {})
    return {name: Path(source) for name, source in named.items() if Path(source).exists()}


def absolute(config: Config) -> Config:
    """Return the config with every path absolute, so that it means the same from any folder."""
    found = {name: str(path.resolve()) for name, path in places(config).items()}
    if "reward.function" in found:
        found["reward.function"] += f":{str(config.reward.function).rpartition(':')[2]}"
    return changed(config, found)


def with_revisions(config: Config, was: Config | None) -> Config:
    """Return the config with a commit behind every hub id that names none: that of `was`, else today's.

    Raises InputError for what the hub does not have.
    """
    found, theirs = {}, sources(was) if was else {}
    for name, source in sources(config).items():
        if is_id(source):
            known = theirs.get(name, "").startswith(f"{source}@")
            found[name] = theirs[name] if known else pinned(source, name)
    return changed(config, found)
