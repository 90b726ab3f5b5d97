"""Which rows are used for what, and why are the others left out?"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from detoxrl.config.schema import Config
from detoxrl.data.duplicates import near_duplicate_groups
from detoxrl.data.rows import SPLITS, TOXIC_PROMPT, Row
from detoxrl.errors import require
from detoxrl.runtime.randomness import permutation

_SYNONYMS = {"dev": "validation", "val": "validation", "valid": "validation"}
_LIMITS = {"train": "data.limit", "validation": "rl.validation_prompts", "test": "evaluation.prompts"}
_UNUSED = "in a split that no stage uses"
_FURTHER_REFERENCE = "further reference of a row"
_TOO_CIVIL = "below data.min_toxicity"
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

    Near-duplicate texts never have different roles. `lengths` measures texts in the unit of the config, and `uses`
    names the roles that need rows. Raises InputError, with the counts of what was left out, if one has too few.
    """
    roles = _roles(source, config, uses)
    has_references = any(row.references for split in roles for row in source[split])
    needs_reference = config.data.reference_column is not None or (config.task.needs_reference and has_references)
    unfit = partial(_unfit, config=config, needs_reference=needs_reference)

    candidates: list[_Candidate] = []
    for split, role in roles.items():
        candidates += _checked([_Candidate(row, split, role) for row in source[split]], lengths, unfit)

    training_groups = _remove_leaks(candidates)
    _draw_missing_splits(training_groups, set(roles.values()), config)
    _leave_out_civil_training_rows(candidates, config)
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


def _checked(
    candidates: list[_Candidate], lengths: Callable[[list[str]], list[int]], unfit: Callable[[Row, int], str]
) -> list[_Candidate]:
    """Return the rows of a split with a reason for each that is unfit by itself or repeats another.

    The references of rows with the same text belong to the first of them. Without a reference of its own, such a row is
    a duplicate.
    """
    first_with: dict[str, _Candidate] = {}
    row_lengths = lengths([candidate.row.text for candidate in candidates])

    for candidate, length in zip(candidates, row_lengths, strict=True):
        candidate.reason = unfit(candidate.row, length)
        if candidate.reason:
            continue

        normalised = " ".join(candidate.row.text.casefold().split())
        first = first_with.setdefault(normalised, candidate)
        if first is not candidate:
            candidate.reason = _merge_references(first, candidate.row)

    return candidates


def _merge_references(first: _Candidate, row: Row) -> str:
    """Give the references of a row to the first row with the same text; return what the row is then."""
    new = tuple(reference for reference in row.references if reference not in first.row.references)
    if not new:
        return "duplicate"

    civil = tuple(reference for reference in row.civil_references if reference in new)
    first.row = replace(
        first.row,
        references=first.row.references + new,
        civil_references=first.row.civil_references + civil,
    )
    return _FURTHER_REFERENCE


def _unfit(row: Row, length: int, config: Config, needs_reference: bool) -> str:
    """Return why a row is unfit by itself, or an empty string."""
    if not row.text.strip():
        return config.task.missing
    if needs_reference and not row.references:
        return f"no {config.task.reference}"
    if config.data.toxicity_column is not None and row.toxicity is None:
        return "no toxicity"
    if length < config.data.min_length:
        return "too short"
    if config.data.max_length is not None and length > config.data.max_length:
        return "too long"
    return ""


def _used_for(role: str, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    return [candidate for candidate in candidates if not candidate.reason and candidate.role == role]


def _remove_leaks(candidates: Sequence[_Candidate]) -> list[list[_Candidate]]:
    """Leave out near-duplicates of test and validation rows. Return the groups of near-duplicate training rows left."""
    used = [candidate for candidate in candidates if not candidate.reason]
    groups = near_duplicate_groups([candidate.row.text for candidate in used])
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
    """Give training rows, in whole groups of near-duplicates, to the roles that have no split of their own.

    Where toxicities are known, groups that begin with a toxic row alternate with others.
    """
    total = sum(map(len, groups))
    space = {
        "test": min(config.evaluation.prompts, max(2, total // 5)),
        "validation": min(config.rl.validation_prompts, max(2, total // 10)),
    }
    missing = [role for role in space if role not in existing]

    order = permutation(config.seed, "splits", 0, len(groups))
    for drawn in _alternating(order, [group[0].row for group in groups]):
        group = groups[drawn]
        for role in missing:
            if len(group) <= space[role]:
                space[role] -= len(group)
                for candidate in group:
                    candidate.role = role
                break


def _alternating(order: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """Return the indices in `order` so that toxic rows alternate with others, as long as there are both."""
    toxic = [index for index in order if (rows[index].toxicity or 0) >= TOXIC_PROMPT]
    others = [index for index in order if (rows[index].toxicity or 0) < TOXIC_PROMPT]
    alternating: list[int] = []
    for pair in zip_longest(toxic, others):
        alternating += [index for index in pair if index is not None]
    return alternating


def _leave_out_civil_training_rows(candidates: Sequence[_Candidate], config: Config) -> None:
    """Leave out training rows whose text is less toxic than the config asks for."""
    for candidate in _used_for("train", candidates):
        toxicity = candidate.row.toxicity
        if toxicity is not None and toxicity < config.data.min_toxicity:
            candidate.reason = _TOO_CIVIL


def _apply_limits(candidates: Sequence[_Candidate], config: Config) -> None:
    """Leave out rows, drawn by the seed, beyond the maximum number that the config sets for each role.

    Where toxicities are known, half of the held-out rows that stay are toxic, as far as there are so many.
    """
    limits = {
        "train": config.data.limit,
        "validation": config.rl.validation_prompts,
        "test": config.evaluation.prompts,
    }
    for role, limit in limits.items():
        used = _used_for(role, candidates)
        order: Sequence[int] = permutation(config.seed, f"rows {role}", 0, len(used))
        if role != "train":
            order = _alternating(order, [candidate.row for candidate in used])
        for position in order[limit:]:
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
        needed = config.rl.prompts_per_step
        rule = f"needs {needed} prompts a step, and {available} rows are left for training ({left_out})"
        require(available >= needed, "rl.batch_size", config.rl.batch_size, rule, "lower it, or add rows")
