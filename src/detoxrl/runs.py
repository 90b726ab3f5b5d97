"""Which reward, judge and policy does a config name?"""

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import transformers
from accelerate import PartialState

from detoxrl.config.edit import flatten, with_settings
from detoxrl.config.schema import Config, without_revision
from detoxrl.data.rows import Row, read_rows
from detoxrl.errors import InputError, require
from detoxrl.evaluation.compare import Pairs, Readers
from detoxrl.evaluation.judges import Judge, classifier_judge, memoized, profanity_judge
from detoxrl.evaluation.similarity import load_encoder
from detoxrl.evaluation.statistics import Floats
from detoxrl.models.loading import with_fast_attention
from detoxrl.models.lora import initial_adapter
from detoxrl.rewards.classifier import CIVIL_PROBE, TOXIC_PROBE, Texts, load_classifier
from detoxrl.rewards.fit import LABELS
from detoxrl.rewards.function import RewardFunction, function_name, load_function, validated_reward
from detoxrl.rewards.shaping import Reward
from detoxrl.runtime.files import explain_corruption
from detoxrl.runtime.hub import is_hub_id, pin_revision
from detoxrl.runtime.run_folder import RunFolder

_OTHERS = "evaluation.other_judges"
# Settings that may name something on disk, and what stands there before a label or name; words that never do.
_PLACES = dict.fromkeys(("data.source", "policy.base", "policy.adapter", "reward.classifier", "evaluation.encoder",
                         "evaluation.primary_judge", "evaluation.nli"), "")  # fmt: skip
_PLACES |= {"evaluation.fluency": "=", "reward.function": ":"}
_RESERVED = ("embedded", "scratch", "none", "alt-profanity-check")

# Progress bars and notices of others would tear ours apart; their errors still come through.
warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Scorer(NamedTuple):
    """What training maximises, and the same model as a judge where it is a classifier (not an independent one)."""

    reward: Reward
    judge: Judge | None


def scorer(config: Config, folder: RunFolder | None, given: RewardFunction | None) -> Scorer | None:
    """Return the reward, tried on a few texts: a function that was given or named, else a classifier.

    The embedded one is in the `folder` of a prepared run; without a folder it is None. Raises InputError if unfit.
    """
    name = config.reward.function
    if given is not None or name is not None:
        reward = validated_reward(load_function(str(name)) if given is None else given, str(name))
        reward(["", "", ""], [CIVIL_PROBE, TOXIC_PROBE, ""])
        return Scorer(reward=reward, judge=None)
    source, labels = config.reward.classifier, label_settings(config, "reward.classifier")
    if source == "embedded" and folder:
        source = str(folder.need("reward", "prepare"))
    elif source == "embedded":
        for (setting, label), right in zip(labels.items(), reversed(LABELS), strict=False):
            rule = "is not what the embedded classifier calls it"
            require(label.lower() == right, setting, label, rule, f"say {right}")
        return None
    classifier = load_classifier(source, "reward.classifier", labels, PartialState().device, config.reward.score)
    if config.reward.bf16:
        with_fast_attention(classifier.model.bfloat16())
    return Scorer(reward=classifier.score, judge=classifier_judge(classifier))


def label_settings(config: Config, field: str) -> dict[str, str]:
    """Return the labels of the classifier that the setting `field` names, by their settings, the toxic one first."""
    if field == "evaluation.primary_judge":
        return {"evaluation.judge_label": config.evaluation.judge_label}
    good = {"reward.good_label": config.reward.good_label} if config.reward.good_label else {}
    return {"reward.toxic_label": config.reward.toxic_label} | good


def run_scorer(folder: RunFolder, config: Config, given: RewardFunction | None) -> Scorer:
    """Return the reward of a prepared run."""
    found = scorer(config, folder, given)
    assert found is not None
    return found


def judges_of(config: Config) -> dict[str, Judge]:
    """Return the judges by name, the primary one first; each rates a text once.

    Raises InputError when the package of one is missing, or a classifier has no such label.
    """
    settings = config.evaluation
    named = [(settings.primary_judge, settings.judge_label, "evaluation.primary_judge", "evaluation.judge_label")]
    named += [(*_labelled(other), _OTHERS, _OTHERS) for other in settings.other_judges]
    found: dict[str, Judge] = {}
    for source, label, field, label_field in named:
        name = f"{_called(source)} ({label})" if _called(source) in found else _called(source)
        judge: Judge | None = profanity_judge() if source == "alt-profanity-check" else None
        if source != "alt-profanity-check":
            judge = classifier_judge(load_classifier(source, field, {label_field: label}, PartialState().device))
        if judge is None:
            raise InputError(field, source, "is not installed", "pip install 'detoxrl[offline]'")
        found[name] = memoized(judge)
    return found


def readers_of(config: Config, scorer: Scorer | None) -> Readers:
    """Return what reads responses beside judges: the reward, and what the evaluation's settings name."""
    settings, device = config.evaluation, PartialState().device

    def said(source: str, label: str, field: str) -> Callable[[Texts], Floats]:
        return classifier_judge(load_classifier(source, field, {field: label}, device, probed=False))

    def scores(pairs: Pairs) -> Floats:
        assert scorer is not None
        return scorer.reward([prompt for prompt, _ in pairs], [text for _, text in pairs]).double().numpy()

    return Readers(
        score=memoized(scores) if scorer else None,
        encode=load_encoder(settings.encoder, device) if settings.encoder else None,
        # Of a premise (a dialogue) and a hypothesis (a response) that do not fit the longer is cut.
        entails=said(settings.nli, "entailment", "evaluation.nli") if settings.nli else None,
        fluent=said(*_labelled(settings.fluency), "evaluation.fluency") if settings.fluency else None,
    )


def _labelled(value: str) -> tuple[str, str]:
    """Return source and label of SOURCE=LABEL, as the settings' rules have it."""
    source, _, label = value.rpartition("=")
    return source, label


def _called(source: str) -> str:
    """Return what a judge is called in results: a folder's name without the path to it, or the hub id."""
    path = Path(without_revision(source))
    return path.name if path.is_absolute() else str(path)


def rows_of(folder: RunFolder, split: str) -> list[Row]:
    """Return the rows of a split of a prepared run."""
    path = folder.need(f"data/{split}.jsonl", "prepare")
    with explain_corruption(path, "remove seconds.json, and --resume makes the rows again"):
        return read_rows(path)


def base_and_start(folder: RunFolder, config: Config) -> tuple[str, Path | None]:
    """Return the policy's base and the adapter it starts from: what sft made, else what the config names."""
    base, start = folder / "base", folder / "start"
    if config.sft.steps > 0:
        folder.need("base" if config.sft.full_weights else "start", "sft")
    named = str(base.resolve()) if base.is_dir() else config.policy.base
    return named, start if start.is_dir() else initial_adapter(config.policy)


def sources(config: Config) -> dict[str, str]:
    """Return the settings that name data, a model or a file which the run reads, with the path or hub id."""
    found: dict[str, str] = {}
    _with_sources(config, lambda name, source: found.setdefault(name, source))
    return found


def local_sources(config: Config) -> dict[str, Path]:
    """Return the settings that name something on disk, with its path."""
    return {name: Path(source) for name, source in sources(config).items() if Path(source).exists()}


def with_absolute_paths(config: Config, given: RewardFunction | None = None) -> Config:
    """Return the config with every path absolute, and the name of a reward `given` in Python: the same anywhere."""
    if given is not None:
        config = with_settings(config, {"reward.function": function_name(given)})
    return _with_sources(config, lambda _, source: str(Path(source).resolve()) if Path(source).exists() else source)


def with_revisions(config: Config, was: Config | None) -> Config:
    """Return the config with a commit behind every hub id that has none: `was`'s, else today's. Raises InputError."""
    theirs = sources(was) if was else {}

    def dated(name: str, source: str) -> str:
        known = theirs.get(name, "")
        return known if is_hub_id(source) and known.startswith(f"{source}@") else pin_revision(source, name)

    return _with_sources(config, dated)


def _with_sources(config: Config, change: Callable[[str, str], str]) -> Config:
    """Return the config with what `change` makes of each path or hub id; labels stay. Other judges are numbered."""

    def one(name: str, value: str | None, mark: str) -> str | None:
        source = value.rpartition(mark)[0] if value and mark else value
        unread = name == "reward.classifier" and config.reward.function
        if not value or not source or source in _RESERVED or unread or (mark == ":" and not Path(source).exists()):
            return value
        return change(name, source) + value.removeprefix(source)

    flat = flatten(asdict(config))
    new: dict[str, Any] = {name: one(name, flat[name], mark) for name, mark in _PLACES.items()}
    new[_OTHERS] = [one(f"{_OTHERS} {i}", other, "=") for i, other in enumerate(flat[_OTHERS])]
    return with_settings(config, new)
