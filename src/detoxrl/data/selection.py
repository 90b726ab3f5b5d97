"""Which rows are used for what, and why are the others not?"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from detoxrl.config.schema import Config, DataConfig
from detoxrl.data.duplicates import near_duplicate_groups
from detoxrl.data.rows import SPLITS, Row
from detoxrl.errors import require
from detoxrl.runtime.randomness import permutation

_ROLES = {"dev": "validation", "val": "validation", "valid": "validation"}
_LEAKS = ("leaks from test", "leaks from validation")
_LIMITS = {"train": "data.limit", "validation": "rl.validation_prompts", "test": "evaluation.prompts"}
# What is told last of a split, in this order.
_LAST = [*_LEAKS, *(f"beyond {name}" for name in _LIMITS.values()), *(f"used for {role}" for role in SPLITS)]


class Selection(NamedTuple):
    """The rows of each split, and for each split of the source how many of its rows came to what."""

    rows: dict[str, list[Row]]
    outcomes: dict[str, dict[str, int]]


def select(
    source: Mapping[str, Sequence[Row]],
    config: Config,
    lengths: Callable[[list[str]], list[int]],
    uses: Sequence[str] = SPLITS,
) -> Selection:
    """Return train, validation and test rows; what a source has not split is split here, by the seed.

    Dialogues that are the same, or nearly so, never stand on two sides. `lengths` measures dialogues by the config's
    unit, `uses` says which splits there have to be. Raises InputError, with what took them, if one has too few rows.
    """
    roles = _roles(source, config, uses)
    rows = [row for split in roles for row in source[split]]
    origins = [split for split in roles for _ in source[split]]
    # What becomes of each row: the split that it is used for, or the reason why it is not.
    fates = [reason or role for split, role in roles.items() for reason in _sifted(source[split], config.data, lengths)]
    _keep_apart(rows, fates, roles.values(), config)
    for role, name in _LIMITS.items():
        those = [i for i, fate in enumerate(fates) if fate == role]
        for position in permutation(config.seed, f"rows {role}", 0, len(those))[attrgetter(name)(config) :]:
            fates[those[position]] = f"beyond {name}"
    found = Counter(zip(origins, (f"used for {fate}" if fate in SPLITS else fate for fate in fates), strict=True))
    found += Counter({(split, "in a split that no stage uses"): len(source[split]) for split in source.keys() - roles})
    counts = sorted(found.items(), key=lambda item: _LAST.index(item[0][1]) if item[0][1] in _LAST else -1)
    counted = {split: {outcome: n for (where, outcome), n in counts if where == split} for split in source}
    used = {role: [row for row, fate in zip(rows, fates, strict=True) if fate == role] for role in SPLITS}
    _refuse_too_few(used, counted, config, uses)
    return Selection(rows=used, outcomes=counted)


def _roles(source: Mapping[str, Sequence[Row]], config: Config, uses: Sequence[str]) -> dict[str, str]:
    """Return what each split of the source is for; a single split is for everything, unless it is all of `uses`."""
    if len(source) == 1 and [*source] != [*uses]:
        return {split: "train" for split in source}
    roles = {split: _ROLES.get(split, split) for split in source}
    remedy = f"it has {', '.join(source)}; give a single file to have it split"
    there = uses[0] in roles.values()
    require(there, "data.source", config.data.source, f"has no split named {uses[0]}", remedy)
    return {split: role for split, role in roles.items() if role in SPLITS}


def _sifted(rows: Sequence[Row], config: DataConfig, lengths: Callable[[list[str]], list[int]]) -> Iterator[str]:
    """Yield for each row the reason to leave it out, empty when there is none."""
    seen: set[str] = set()
    for row, length in zip(rows, lengths([row.dialogue for row in rows]), strict=True):
        same = " ".join(row.dialogue.casefold().split())
        if not same:
            yield "no dialogue"
        elif row.summary is not None and not row.summary.strip():
            yield "no summary"
        elif length < config.min_length:
            yield "too short"
        elif config.max_length is not None and length > config.max_length:
            yield "too long"
        else:
            yield "duplicate" if same in seen else ""
            seen.add(same)


def _keep_apart(rows: Sequence[Row], fates: list[str], given: Collection[str], config: Config) -> None:
    """Leave out what is nearly the same on two sides, and fill the splits that are not `given` from training rows.

    A split gets whole groups of near-same dialogues, drawn by the seed.
    """
    held = [i for i, fate in enumerate(fates) if fate in SPLITS]
    groups = near_duplicate_groups([rows[i].dialogue for i in held])
    sides = {(fates[i], group) for i, group in zip(held, groups, strict=True)}
    pool: dict[int, list[int]] = {}
    for i, group in zip(held, groups, strict=True):
        if fates[i] != "test" and ("test", group) in sides:
            fates[i] = _LEAKS[0]
        elif fates[i] == "train" and ("validation", group) in sides:
            fates[i] = _LEAKS[1]
        elif fates[i] == "train":
            pool.setdefault(group, []).append(i)
    size = sum(map(len, pool.values()))
    room = {"test": min(config.evaluation.prompts, max(2, size // 5)),
            "validation": min(config.rl.validation_prompts, max(2, size // 10))}  # fmt: skip
    whole = list(pool.values())
    for drawn in permutation(config.seed, "splits", 0, len(whole)):
        fits = (role for role in room if role not in given and len(whole[drawn]) <= room[role])
        role = next(fits, "train")
        for i in whole[drawn]:
            fates[i] = role
        room[role] = room.get(role, 0) - len(whole[drawn])


def _refuse_too_few(
    rows: Mapping[str, list[Row]], outcomes: Mapping[str, Mapping[str, int]], config: Config, uses: Sequence[str]
) -> None:
    took = sum(map(Counter, outcomes.values()), Counter[str]())
    reasons = [f"{n} {outcome}" for outcome, n in took.most_common() if not outcome.startswith("used")]
    why, remedy = ", ".join(reasons) or "none was left out", "give more that differ, or loosen what takes them"
    for role in uses:
        rule = f"leaves {len(rows[role])} rows for {role} ({why})"
        require(len(rows[role]) >= 2, "data.source", config.data.source, rule, remedy)
    size, left = config.rl.batch_size, len(rows["train"])
    rule = f"exceeds the {left} rows left for training ({why})"
    require("train" not in uses or left >= size, "rl.batch_size", size, rule, "give a smaller one, or more rows")
