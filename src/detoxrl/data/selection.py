"""Which rows are used for what, and why are the others not?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from detoxrl.config import Config, DataConfig
from detoxrl.data.near import near_groups
from detoxrl.data.rows import SPLITS, Row
from detoxrl.errors import InputError, require
from detoxrl.randomness import permutation

_ROLES = {"dev": "validation", "val": "validation", "valid": "validation"}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rows of each split, and for each split of the source how many of its rows came to what."""

    rows: dict[str, list[Row]]
    outcomes: dict[str, dict[str, int]]


def select(source: Mapping[str, Sequence[Row]], config: Config, lengths: Callable[[list[str]], list[int]]) -> Selection:
    """Return train, validation and test rows; what a source has not split is split here, by the seed.

    Dialogues that are the same, or nearly so, never stand on two sides. `lengths` measures dialogues by the config's
    unit. Raises InputError when too few rows are left, saying what took them.
    """
    outcomes = {split: Counter[str]() for split in source}
    rows: dict[str, list[Row]] = {}
    origin: dict[int, str] = {}
    roles = _roles(source, config)
    for split, role in roles.items():
        rows.setdefault(role, [])
        for row, reason in _sifted(source[split], config.data, lengths):
            if reason:
                outcomes[split][reason] += 1
            else:
                rows[role].append(row)
                origin[id(row)] = split
    for split in source.keys() - roles.keys():
        outcomes[split]["in a split that no stage uses"] += len(source[split])
    place = {key: n for n, key in enumerate(origin)}
    rows, lost = _apart(rows, config)
    for role, limit, name in _limits(config):
        rows[role].sort(key=lambda row: place[id(row)])
        rows[role], over = _sample(rows[role], limit, config.seed, role)
        lost[f"beyond {name}"] = over
    named = lost | {f"used for {role}": rows[role] for role in SPLITS}
    for outcome, those in named.items():
        for row in those:
            outcomes[origin[id(row)]][outcome] += 1
    counted = {split: {outcome: n for outcome, n in counts.items() if n} for split, counts in outcomes.items()}
    _refuse_too_few(rows, counted, config)
    return Selection(rows=rows, outcomes=counted)


def _roles(source: Mapping[str, Sequence[Row]], config: Config) -> dict[str, str]:
    """Return what each split of the source is for; a single split is for everything."""
    if len(source) == 1:
        return {split: "train" for split in source}
    roles = {split: _ROLES.get(split, split) for split in source}
    remedy = f"it has {', '.join(source)}; give a single file to have it split"
    require("train" in roles.values(), "data.source", config.data.source, "has no split named train", remedy)
    return {split: role for split, role in roles.items() if role in SPLITS}


def _sifted(
    rows: Sequence[Row], config: DataConfig, lengths: Callable[[list[str]], list[int]]
) -> Iterator[tuple[Row, str]]:
    """Yield each row with the reason to leave it out, empty when there is none."""
    seen: set[str] = set()
    for row, length in zip(rows, lengths([row.dialogue for row in rows]), strict=True):
        same = " ".join(row.dialogue.casefold().split())
        if not same:
            yield row, "no dialogue"
        elif row.summary is not None and not row.summary.strip():
            yield row, "no summary"
        elif length < config.min_length:
            yield row, "too short"
        elif config.max_length is not None and length > config.max_length:
            yield row, "too long"
        elif same in seen:
            yield row, "duplicate"
        else:
            seen.add(same)
            yield row, ""


def _apart(rows: dict[str, list[Row]], config: Config) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return the rows by split with no near-same dialogue on two sides, and the rows that leak, by reason."""
    every = [(role, row) for role, those in rows.items() for row in those]
    groups = near_groups([row.dialogue for _, row in every])
    held = {role: {g for g, (r, _) in zip(groups, every, strict=True) if r == role} for role in ("test", "validation")}
    kept: dict[str, list[Row]] = {role: [] for role in SPLITS}
    lost: dict[str, list[Row]] = {"leaks from test": [], "leaks from validation": []}
    pool: dict[int, list[Row]] = {}
    for group, (role, row) in zip(groups, every, strict=True):
        if role != "test" and group in held["test"]:
            lost["leaks from test"].append(row)
        elif role == "train" and group in held["validation"]:
            lost["leaks from validation"].append(row)
        elif role == "train":
            pool.setdefault(group, []).append(row)
        else:
            kept[role].append(row)
    return kept | _carved(pool, {role for role in SPLITS if role not in rows}, config), lost


def _carved(pool: Mapping[int, list[Row]], missing: set[str], config: Config) -> dict[str, list[Row]]:
    """Return the pool as training rows, less what the missing splits need: whole groups, drawn by the seed."""
    size = sum(map(len, pool.values()))
    room = {"test": min(config.evaluation.prompts, max(2, size // 5)),
            "validation": min(config.rl.validation_prompts, max(2, size // 10))}  # fmt: skip
    carved: dict[str, list[Row]] = {role: [] for role in ("test", "validation") if role in missing} | {"train": []}
    groups = list(pool.values())
    for i in permutation(config.seed, "splits", 0, len(groups)):
        fits = (role for role in carved if role == "train" or len(carved[role]) + len(groups[i]) <= room[role])
        carved[next(fits)].extend(groups[i])
    return carved


def _limits(config: Config) -> list[tuple[str, int, str]]:
    return [
        ("train", config.data.limit, "data.limit"),
        ("validation", config.rl.validation_prompts, "rl.validation_prompts"),
        ("test", config.evaluation.prompts, "evaluation.prompts"),
    ]


def _sample(rows: list[Row], limit: int, seed: int, role: str) -> tuple[list[Row], list[Row]]:
    """Return at most `limit` rows drawn by the seed, in their old order, and the rest."""
    if len(rows) <= limit:
        return rows, []
    drawn = set(permutation(seed, f"rows {role}", 0, len(rows))[:limit])
    return [row for i, row in enumerate(rows) if i in drawn], [row for i, row in enumerate(rows) if i not in drawn]


def _refuse_too_few(rows: Mapping[str, list[Row]], outcomes: Mapping[str, Mapping[str, int]], config: Config) -> None:
    took = Counter[str]()
    for counts in outcomes.values():
        took.update({outcome: n for outcome, n in counts.items() if not outcome.startswith("used")})
    why = ", ".join(f"{n} {reason}" for reason, n in took.most_common()) or "none was left out"
    for role in SPLITS:
        if len(rows[role]) < 2:
            rule = f"leaves {len(rows[role])} rows for {role} ({why})"
            raise InputError(
                "data.source", config.data.source, rule, "give more that differ, or loosen what takes them"
            )
    if len(rows["train"]) < config.rl.batch_size:
        rule = f"exceeds the {len(rows['train'])} rows left for training ({why})"
        raise InputError("rl.batch_size", config.rl.batch_size, rule, "give a smaller one, or more rows")
