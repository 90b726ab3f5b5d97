"""What is measured side by side beside, or instead of, what a run trains?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from detoxrl.config.schema import Config
from detoxrl.errors import require
from detoxrl.models.loading import require_positions
from detoxrl.models.lora import frozen_policy, load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import require_agreement
from detoxrl.models.weights import POLICY
from detoxrl.runtime.hub import fetch_policy, is_hub_id

# Where a run keeps what it trained, by what that is called among the policies that are measured.
TRAINED = {"after": "adapter", "sft_civil": "baseline", "sft_best_of_4": "expert"}
_TAKEN = {"before", "after", "word_filter", *TRAINED}
# What a config becomes where nothing is trained, and for texts that were written elsewhere, which need no model.
UNTRAINED = {"sft.steps": 0, "sft.baseline_steps": 0, "policy.full_weights": False}
NO_MODEL = UNTRAINED | {"policy.base": "none", "policy.adapter": None, "reward.function": None}
NO_MODEL |= {"data.source": "embedded", "reward.classifier": "embedded"}


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What a user named: policies or texts, each by the name that it has among what is measured."""

    policies: Mapping[str, str] = field(default_factory=dict)  # Folder or hub id of a LoRA or a whole model.
    texts: Mapping[str, str] = field(default_factory=dict)  # Files of responses.
    # What a reader calls "before" and "after", where it is not the start and what was trained from it.
    names: Mapping[str, str] = field(default_factory=dict)


NOTHING = Subjects()


def subjects_of(
    policies: Mapping[str, Path | str] | None, texts: Mapping[str, Path | str] | None, config: Config | None
) -> Subjects:
    """Return what is to be measured in a new folder of `config`, or without one beside a run.

    The first policy is "after", and "before" what the config starts from; of texts the first is "before", the second
    "after"; a single file is compared with its summaries. Raises InputError for a taken name, and for both or neither.
    """
    given = {name: str(path) for name, path in (policies or {}).items()}
    files = {name: str(path) for name, path in (texts or {}).items()}
    for name in (*given, *files):
        free = name not in _TAKEN and not name.startswith("best_of_")
        require(free, "name", name, "is what something else is called", "choose another: NAME=PATH")
    if config is None:
        require(not files, "texts", list(files), "belong to no run", "give config too, and a new folder")
        return Subjects(policies=_lasting(given))
    one = bool(given) != bool(files)
    require(one, "policies", list(given), "or texts have to be given, and not both", "name what is to be measured")
    if given:
        after, *_ = given
        names = {"before": config.policy.adapter or config.policy.base, "after": after}
        by_side = {"after" if name == after else name: path for name, path in _lasting(given).items()}
        return Subjects(policies=by_side, names=names)
    before, after = [*files, *files][:2] if len(files) > 1 else ["its summaries", *files]
    called = {before: "before", after: "after"}
    by_side = {called.get(name, name): path for name, path in files.items()}
    return Subjects(texts=by_side, names={"before": before, "after": after})


def _lasting(sources: Mapping[str, str]) -> dict[str, str]:
    """Return what means the same policies from any folder and at any time: absolute paths, hub ids with a commit."""

    def one(source: str) -> str:
        if is_hub_id(source):
            return f"{source.partition('@')[0]}@{Path(fetch_policy(source, '--policy')).name}"
        return str(Path(source).resolve() if Path(source).exists() else source)

    return {name: one(source) for name, source in sources.items()}


def try_policies(base: str, start: Path | None, given: Mapping[str, str], config: Config) -> None:
    """Raise InputError unless each policy loads, and samples what it scores."""
    for name, policy, _ in policies_of(base, start, {}, given, config):
        require_positions(policy.model.config, config, 0)
        require_agreement(policy, given.get(name, base))


def policies_of(
    base: str, start: Path | None, trained: Mapping[str, Path], given: Mapping[str, str], config: Config
) -> Iterator[tuple[str, Policy, str | None]]:
    """Yield the policies to measure: a name, what samples, and by which adapter. The start comes first, as "before".

    What was `trained` belongs to the base, as a `given` LoRA does; a whole model stands alone. They are where they were
    loaded, not on the device. Raises InputError.
    """
    whole = config.policy.full_weights
    places = {name: Path(fetch_policy(source, "--policy")) for name, source in given.items()}
    loras = {name: place for name, place in places.items() if (place / "adapter_config.json").is_file()}
    adapters = trained if whole else {**trained, **loras}
    # Without an adapter to start from, before is the bare base, and no fresh adapter is needed to ask it.
    begin = None if whole else start or next(iter(adapters.values()), None)
    known = begin or (whole and trained)
    policy = load_policy(base, begin, config.policy, config.seed) if known else frozen_policy(base)
    added = {name: f"measured{number}" for number, name in enumerate(adapters)}
    for name, adapter in added.items():  # before the base may be sharded, which some adapters could not be laid on
        policy.add(adapter, adapters[name])
    yield "before", policy, policy.reference if start else None
    for name, adapter in added.items():
        yield name, policy, adapter
    for name, place in places.items():
        if name in loras and whole:
            lora = replace(config.policy, full_weights=False, adapter=None)
            yield name, load_policy(base, place, lora, config.seed), POLICY
        elif name not in adapters:
            yield name, frozen_policy(str(place), "--policy"), None
