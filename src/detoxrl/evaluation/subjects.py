"""What did a user ask to measure, and what is each of it called in the results?

It is known before anything slow is imported: no torch is needed for the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from detoxrl.config.edit import with_settings
from detoxrl.config.schema import Config
from detoxrl.errors import require
from detoxrl.evaluation.sharpening import SHARPENED
from detoxrl.runtime.hub import pin_policy

# The folder of each policy that a run trains, by its name among the policies that are measured.
TRAINED = {"after": "adapter", "sft_civil": "baseline", "sft_best_of_4": "expert", "dpo_best_and_worst": "dpo"}
# The names of the same policies where they sample with evaluation.top_p.
WITH_TOP_P = {"before": "before_top_p", "after": "after_top_p"}
_RESERVED = {"before", "after", "word_filter", "copy", "human", SHARPENED, *WITH_TOP_P.values(), *TRAINED}

NO_BASE = "none"
"""The value of policy.base in a run that measures texts, which needs no model."""
_UNTRAINED = {"sft.steps": 0, "sft.baseline_steps": 0, "policy.full_weights": False}
_NO_MODEL = {
    **_UNTRAINED,
    "policy.base": NO_BASE,
    "policy.adapter": None,
    "reward.function": None,
    "reward.terms": (),
    "data.source": "embedded",
    "data.stress": None,
    "reward.classifier": "embedded",
}


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What a user asked to measure: policies or texts, each by its name in the results."""

    policies: Mapping[str, str] = field(default_factory=dict)  # Folder or hub id of a LoRA or a whole model.
    texts: Mapping[str, str] = field(default_factory=dict)  # Files of responses.
    # What the report calls "before" and "after", where these are not the initial policy and the trained one.
    names: Mapping[str, str] = field(default_factory=dict)


NO_SUBJECTS = Subjects()


def subjects_of(
    policies: Mapping[str, Path | str] | None, texts: Mapping[str, Path | str] | None, config: Config | None
) -> Subjects:
    """Return what is measured in a new folder with `config`, or without one beside a run.

    The first policy is "after", and the config's initial policy is "before". Of texts the first file is "before" and
    the second "after"; a single file is compared with its references. Nothing is read. Raises InputError for a reserved
    name, and for both policies and texts or neither.
    """
    policy_sources = {name: str(path) for name, path in (policies or {}).items()}
    files = {name: str(path) for name, path in (texts or {}).items()}
    for name in (*policy_sources, *files):
        is_free = name not in _RESERVED and not name.startswith("best_of_")
        require(is_free, "name", name, "is reserved for another policy", "choose another one: NAME=PATH")

    if config is None:
        require(not files, "texts", list(files), "do not belong to a run", "give a config too, and a new folder")
        return Subjects(policies=policy_sources)

    rule = "or texts are required, and not both"
    require(bool(policy_sources) != bool(files), "policies", list(policy_sources), rule, "name what to measure")
    return _policies_as_subjects(policy_sources, config) if policy_sources else _texts_as_subjects(files)


def _policies_as_subjects(sources: Mapping[str, str], config: Config) -> Subjects:
    after = next(iter(sources))
    names = {"before": config.policy.adapter or config.policy.base, "after": after}
    by_side = {"after" if name == after else name: source for name, source in sources.items()}
    return Subjects(policies=by_side, names=names)


def _texts_as_subjects(files: Mapping[str, str]) -> Subjects:
    if len(files) > 1:
        before, after, *_ = files
    else:
        before = "its references"
        (after,) = files
    sides = {before: "before", after: "after"}
    by_side = {sides.get(name, name): path for name, path in files.items()}
    return Subjects(texts=by_side, names={"before": before, "after": after})


def measuring_config(config: Config, subjects: Subjects) -> Config:
    """Return the config of a run that trains nothing, and that needs no model if the subjects are texts."""
    return with_settings(config, _NO_MODEL if subjects.texts else _UNTRAINED)


def with_commits(subjects: Subjects) -> Subjects:
    """Return subjects that mean the same policies from any folder and at any time. Raises InputError as `fetch`."""
    pinned = {name: pin_policy(source, "--policy") for name, source in subjects.policies.items()}
    return replace(subjects, policies=pinned)
