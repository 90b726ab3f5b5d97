"""Which rows are used for what, and why are the others left out?"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from detoxrl.config.schema import Config, DataConfig
from detoxrl.data.duplicates import near_duplicate_groups
from detoxrl.data.rows import SPLITS, Row
from detoxrl.errors import require
from detoxrl.runtime.randomness import permutation

_SYNONYMS = {"dev": "validation", "val": "validation", "valid": "validation"}
_LIMITS = {"train": "data.limit", "validation": "rl.validation_prompts", "test": "evaluation.prompts"}
_UNUSED = "in a split that no stage uses"
# These outcomes come last in the account of a split, in this order.
_LAST_OUTCOMES = [
    "leaks from test",
    "leaks from validation",
    *(f"beyond {setting}" for setting in _LIMITS.values()),
    *(f"used for {role}" for role in SPLITS),
]


class Selection(NamedTuple):
    """The rows by role (train, validation, test), and the number of rows with each outcome by split of the source."""

    rows: dict[str, list[Row]]
    outcomes: dict[str, dict[str, int]]


@dataclass
class _Candidate:
    """A row of the source and what becomes of it. A reason to leave it out ends its use for `role`."""

    row: Row
    split: str
    role: str
    reason: str = ""

    @property
    def outcome(self) -> str:
        return self.reason or f"used for {self.role}"


def select(
    source: Mapping[str, Sequence[Row]],
    config: Config,
    lengths: Callable[[list[str]], list[int]],
    uses: Sequence[str] = SPLITS,
) -> Selection:
    """Return train, validation and test rows. Splits that the source lacks are drawn from its training rows by seed.

    Near-duplicate dialogues never have different roles. `lengths` measures dialogues in the unit of the config, and
    `uses` names the roles that need rows. Raises InputError, with the counts of what was left out, if one has too few.
    """
    roles = _roles(source, config, uses)
    candidates: list[_Candidate] = []

    for split, role in roles.items():
        reasons = _unfit(source[split], config.data, lengths)
        for row, reason in zip(source[split], reasons, strict=True):
            candidates.append(_Candidate(row, split, role, reason))

    training_groups = _remove_leaks(candidates)
    _draw_missing_splits(training_groups, set(roles.values()), config)
    _apply_limits(candidates, config)

    rows = {}
    for role in SPLITS:
        rows[role] = [candidate.row for candidate in _used_for(role, candidates)]

    outcomes = {split: _count_outcomes(split, candidates) for split in source}
    for split in source.keys() - roles:
        if source[split]:
            outcomes[split] = {_UNUSED: len(source[split])}

    _require_enough(rows, outcomes, config, uses)
    return Selection(rows=rows, outcomes=outcomes)


def _roles(source: Mapping[str, Sequence[Row]], config: Config, uses: Sequence[str]) -> dict[str, str]:
    """Return the role of each split that has one. A single split is for training, from which the others are drawn."""
    if len(source) == 1 and list(source) != list(uses):
        return {split: "train" for split in source}

    roles = {split: _SYNONYMS.get(split, split) for split in source}
    rule = f"has the splits {', '.join(source)}, but not {uses[0]}"
    remedy = "add that split, or give a single file to have it split"
    require(uses[0] in roles.values(), "data.source", config.data.source, rule, remedy)
    return {split: role for split, role in roles.items() if role in SPLITS}


def _unfit(rows: Sequence[Row], config: DataConfig, lengths: Callable[[list[str]], list[int]]) -> list[str]:
    """Return for each row of a split why it is unfit by itself or repeats another, or an empty string."""
    reasons = []
    seen: set[str] = set()

    for row, length in zip(rows, lengths([row.dialogue for row in rows]), strict=True):
        reason = _unfit_by_itself(row, length, config)
        if not reason:
            normalised = " ".join(row.dialogue.casefold().split())
            reason = "duplicate" if normalised in seen else ""
            seen.add(normalised)
        reasons.append(reason)
    return reasons


def _unfit_by_itself(row: Row, length: int, config: DataConfig) -> str:
    if not row.dialogue.strip():
        return "no dialogue"
    if row.summary is not None and not row.summary.strip():
        return "no summary"
    if length < config.min_length:
        return "too short"
    if config.max_length is not None and length > config.max_length:
        return "too long"
    return ""


def _used_for(role: str, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    return [candidate for candidate in candidates if not candidate.reason and candidate.role == role]


def _remove_leaks(candidates: Sequence[_Candidate]) -> list[list[_Candidate]]:
    """Leave out near-duplicates of test and validation rows. Return the groups of near-duplicate training rows left."""
    used = [candidate for candidate in candidates if not candidate.reason]
    groups = near_duplicate_groups([candidate.row.dialogue for candidate in used])
    groups_of: dict[str, set[int]] = defaultdict(set)
    for candidate, group in zip(used, groups, strict=True):
        groups_of[candidate.role].add(group)

    training: dict[int, list[_Candidate]] = {}
    for candidate, group in zip(used, groups, strict=True):
        if candidate.role != "test" and group in groups_of["test"]:
            candidate.reason = "leaks from test"
        elif candidate.role == "train" and group in groups_of["validation"]:
            candidate.reason = "leaks from validation"
        elif candidate.role == "train":
            training.setdefault(group, []).append(candidate)
    return list(training.values())


def _draw_missing_splits(groups: Sequence[list[_Candidate]], existing: set[str], config: Config) -> None:
    """Give training rows, in whole groups of near-duplicates, to the roles that have no split of their own."""
    total = sum(map(len, groups))
    space = {
        "test": min(config.evaluation.prompts, max(2, total // 5)),
        "validation": min(config.rl.validation_prompts, max(2, total // 10)),
    }
    missing = [role for role in space if role not in existing]

    for drawn in permutation(config.seed, "splits", 0, len(groups)):
        group = groups[drawn]
        for role in missing:
            if len(group) <= space[role]:
                space[role] -= len(group)
                for candidate in group:
                    candidate.role = role
                break


def _apply_limits(candidates: Sequence[_Candidate], config: Config) -> None:
    """Leave out rows, drawn by the seed, beyond the maximum number that the config sets for each role."""
    limits = {
        "train": config.data.limit,
        "validation": config.rl.validation_prompts,
        "test": config.evaluation.prompts,
    }
    for role, limit in limits.items():
        used = _used_for(role, candidates)
        shuffled = permutation(config.seed, f"rows {role}", 0, len(used))
        for position in shuffled[limit:]:
            used[position].reason = f"beyond {_LIMITS[role]}"


def _count_outcomes(split: str, candidates: Sequence[_Candidate]) -> dict[str, int]:
    """Return how many rows of a split of the source had each outcome."""
    counts = Counter(candidate.outcome for candidate in candidates if candidate.split == split)

    def rank(outcome: str) -> int:
        return _LAST_OUTCOMES.index(outcome) if outcome in _LAST_OUTCOMES else -1

    return {outcome: counts[outcome] for outcome in sorted(counts, key=rank)}


def _require_enough(
    rows: Mapping[str, list[Row]], outcomes: Mapping[str, Mapping[str, int]], config: Config, uses: Sequence[str]
) -> None:
    """Raise InputError if a role in `uses` has fewer than two rows, or training fewer than one batch."""
    totals: Counter[str] = Counter()
    for counts in outcomes.values():
        totals.update(counts)

    reasons = [f"{count} {outcome}" for outcome, count in totals.most_common() if not outcome.startswith("used")]
    left_out = ", ".join(reasons) or "no row was left out"

    for role in uses:
        rule = f"leaves {len(rows[role])} rows for {role} ({left_out})"
        remedy = "add distinct rows, or relax what leaves them out"
        require(len(rows[role]) >= 2, "data.source", config.data.source, rule, remedy)

    if "train" in uses:
        available = len(rows["train"])
        batch_size = config.rl.batch_size
        rule = f"exceeds the {available} rows left for training ({left_out})"
        require(available >= batch_size, "rl.batch_size", batch_size, rule, "lower it, or add rows")
