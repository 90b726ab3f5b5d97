"""Which policies are measured side by side, beside or instead of what a run trains?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from detoxrl.config.schema import Config
from detoxrl.errors import require
from detoxrl.models.base import Base
from detoxrl.models.loading import require_positions
from detoxrl.models.lora import frozen_policy, load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import require_agreement
from detoxrl.models.weights import POLICY
from detoxrl.runtime.hub import fetch_policy, is_hub_id

# The folder of each policy that a run trains, by its name among the policies that are measured.
TRAINED = {"after": "adapter", "sft_civil": "baseline", "sft_best_of_4": "expert"}
_RESERVED = {"before", "after", "word_filter", *TRAINED}

# The settings of a run that trains nothing.
UNTRAINED = {"sft.steps": 0, "sft.baseline_steps": 0, "policy.full_weights": False}
# The settings of a run that measures texts which were written elsewhere, and needs no model.
NO_MODEL = {
    **UNTRAINED,
    "policy.base": "none",
    "policy.adapter": None,
    "reward.function": None,
    "data.source": "embedded",
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
    the second "after"; a single file is compared with its summaries. Raises InputError for a reserved name, and for
    both policies and texts or neither.
    """
    policy_sources = {name: str(path) for name, path in (policies or {}).items()}
    files = {name: str(path) for name, path in (texts or {}).items()}
    for name in (*policy_sources, *files):
        is_free = name not in _RESERVED and not name.startswith("best_of_")
        require(is_free, "name", name, "is reserved for another policy", "choose another one: NAME=PATH")

    if config is None:
        require(not files, "texts", list(files), "do not belong to a run", "give a config too, and a new folder")
        return Subjects(policies=_pinned(policy_sources))

    rule = "or texts are required, and not both"
    require(bool(policy_sources) != bool(files), "policies", list(policy_sources), rule, "name what to measure")
    return _policies_as_subjects(policy_sources, config) if policy_sources else _texts_as_subjects(files)


def _policies_as_subjects(sources: Mapping[str, str], config: Config) -> Subjects:
    after = next(iter(sources))
    names = {"before": config.policy.adapter or config.policy.base, "after": after}
    by_side = {"after" if name == after else name: source for name, source in _pinned(sources).items()}
    return Subjects(policies=by_side, names=names)


def _texts_as_subjects(files: Mapping[str, str]) -> Subjects:
    if len(files) > 1:
        before, after, *_ = files
    else:
        before = "its summaries"
        (after,) = files
    sides = {before: "before", after: "after"}
    by_side = {sides.get(name, name): path for name, path in files.items()}
    return Subjects(texts=by_side, names={"before": before, "after": after})


def _pinned(sources: Mapping[str, str]) -> dict[str, str]:
    """Return sources that mean the same policies from any folder and at any time."""
    return {name: _pin(source) for name, source in sources.items()}


def _pin(source: str) -> str:
    if is_hub_id(source):
        commit = Path(fetch_policy(source, "--policy")).name
        return f"{source.partition('@')[0]}@{commit}"
    path = Path(source)
    return str(path.resolve()) if path.exists() else source


class MeasuredPolicies:
    """The policies to measure by name, the initial policy first as "before".

    Policies that the run trained, and LoRAs of the same base, are adapters of one policy in memory. Whole models are
    loaded one at a time. They are on the device where they were loaded. `load_base(bf16)` returns the base in bfloat16
    or in fp32. Raises InputError for a policy that does not load.
    """

    def __init__(
        self,
        load_base: Callable[[bool], Base],
        initial_adapter: Path | None,
        trained: Mapping[str, Path],
        given: Mapping[str, str],
        config: Config,
    ) -> None:
        self._initial_adapter = initial_adapter
        self._config = config
        self._folders = {name: Path(fetch_policy(source, "--policy")) for name, source in given.items()}
        self._loras = {
            name: folder for name, folder in self._folders.items() if (folder / "adapter_config.json").is_file()
        }

        self._full_weights = config.policy.full_weights
        adapters = dict(trained) if self._full_weights else {**trained, **self._loras}
        # Without an adapter to start from, "before" is the base alone, so any adapter serves to load it.
        start = None if self._full_weights else initial_adapter or next(iter(adapters.values()), None)
        if start is not None or (self._full_weights and adapters):
            self._base = load_base(config.policy.bf16)
            self._policy = self._base.policy(start, config.policy, config.seed)
        else:
            self._base = load_base(False)  # Whole models beside it are in fp32 too.
            self._policy = self._base.frozen_policy()

        self._adapter_names: dict[str, str] = {}
        for number, (name, folder) in enumerate(adapters.items()):
            self._adapter_names[name] = f"measured{number}"
            self._base.add_adapter(self._policy, self._adapter_names[name], folder)

        others = [name for name in self._folders if name not in adapters]
        self.names = ["before", *adapters, *others]
        self._other: tuple[str, Policy] | None = None  # The whole model that is in memory.

    def get(self, name: str) -> tuple[Policy, str | None]:
        """Return the policy that samples as `name`, and the adapter by which it does."""
        if name == "before":
            return self._policy, self._policy.reference if self._initial_adapter else None
        if name in self._adapter_names:
            return self._policy, self._adapter_names[name]

        if self._other is None or self._other[0] != name:
            self._other = None  # Its memory is free before the next one is loaded.
            self._other = (name, self._load_other(name))
        return self._other[1], POLICY if name in self._loras else None

    def _load_other(self, name: str) -> Policy:
        folder = self._folders[name]
        if name not in self._loras:
            return frozen_policy(str(folder), "--policy")
        # A LoRA beside a run that trains full weights stands on a base of its own.
        settings = replace(self._config.policy, full_weights=False, adapter=None)
        return load_policy(self._base.source, folder, settings, self._config.seed)


def try_policies(policies: MeasuredPolicies, given: Mapping[str, str], config: Config) -> None:
    """Raise InputError unless each policy loads, and samples with the log-probs that it scores with."""
    for name in policies.names:
        policy, _ = policies.get(name)
        require_positions(policy.model.config, config, 0)
        require_agreement(policy, given.get(name, config.policy.base))
