"""Which labelled examples train, which validate, and which are kept for the test?

This needs no torch.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from detoxrl.config.fit import FitConfig
from detoxrl.data.duplicates import near_duplicate_groups
from detoxrl.data.labelled import Example, Labelled
from detoxrl.errors import require
from detoxrl.runtime.randomness import permutation

_SYNONYMS = {"dev": "validation", "val": "validation", "valid": "validation"}
_ROLES = ("train", "validation", "test")
# Fewer examples than this cannot be fitted, calibrated or measured.
_FEWEST = {"train": 20, "validation": 5, "test": 5}


class Division(NamedTuple):
    """The examples by role, and what was found while they were divided."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    leaks: dict[str, int]  # Held-out examples that were removed, by role.
    conflicts: int  # Texts, or pairs, that occur with different labels.
    unused: int  # Examples in splits that have no role.


def divide(labelled: Labelled, config: FitConfig) -> Division:
    """Return the examples by role: by the splits of the source, and by seed where it lacks one.

    A row's examples stay together. Held-out examples with a text that is a near-duplicate of one in an earlier role
    are removed. Raises InputError when too few are left, when too few held-out ones have a label, or when a label is
    the same in every training example.
    """
    by_role = _by_role(labelled.examples, config)
    unused = len(labelled.examples) - sum(map(len, by_role.values()))
    conflicts = _count_conflicts(labelled.examples)
    leaks = _remove_leaks(by_role)

    for role, fewest in _FEWEST.items():
        _require_enough(by_role[role], role, fewest, leaks.get(role, 0), config)
    _require_contrast(by_role["train"], labelled)
    _require_held_out_labels(by_role, labelled)
    return Division(**by_role, leaks=leaks, conflicts=conflicts, unused=unused)


def _by_role(examples: Sequence[Example], config: FitConfig) -> dict[str, list[Example]]:
    splits = dict.fromkeys(example.split for example in examples)
    if len(splits) == 1:
        roles = dict.fromkeys(splits, "train")
    else:
        roles = {split: _SYNONYMS.get(split, split) for split in splits}
        has_training = "train" in roles.values() or not splits
        rule = f"has the splits {', '.join(splits)}, but not train"
        require(has_training, "source", config.source, rule, "add that split, or give a single file")

    by_role: dict[str, list[Example]] = {role: [] for role in _ROLES}
    for example in examples:
        if roles[example.split] in by_role:
            by_role[roles[example.split]].append(example)

    missing = [role for role in ("test", "validation") if role not in roles.values()]
    _draw(by_role, missing, config)
    return by_role


def _draw(by_role: dict[str, list[Example]], missing: Sequence[str], config: FitConfig) -> None:
    """Move rows that are drawn by seed from the training examples to the roles that are missing."""
    rows = list(dict.fromkeys((example.split, example.row) for example in by_role["train"]))
    shuffled = permutation(config.seed, "fit split", 0, len(rows))
    count = round(len(rows) * config.held_out / 2)

    role_of = {}
    for place, role in enumerate(missing):
        for number in shuffled[place * count : (place + 1) * count]:
            role_of[rows[number]] = role

    training = by_role["train"]
    by_role["train"] = []
    for example in training:
        by_role[role_of.get((example.split, example.row), "train")].append(example)


def _remove_leaks(by_role: dict[str, list[Example]]) -> dict[str, int]:
    """Remove held-out examples whose text has a near-duplicate in an earlier role; return how many, by role."""
    texts = list(dict.fromkeys(text for role in _ROLES for example in by_role[role] for text in example.texts))
    group_of = dict(zip(texts, near_duplicate_groups(texts), strict=True))

    def groups(examples: Iterable[Example]) -> set[int]:
        return {group_of[text] for example in examples for text in example.texts}

    leaks = {}
    seen = groups(by_role["train"])
    for role in ("validation", "test"):
        kept = [example for example in by_role[role] if seen.isdisjoint(groups([example]))]
        leaks[role] = len(by_role[role]) - len(kept)
        by_role[role] = kept
        seen |= groups(kept)
    return leaks


def _count_conflicts(examples: Iterable[Example]) -> int:
    """Return how many texts occur with labels on different sides of 0.5, or pairs in both orders.

    Case and white space are ignored. A label that is missing contradicts none.
    """
    sides: dict[tuple[frozenset[str], int], set[object]] = defaultdict(set)
    for example in examples:
        texts = tuple(" ".join(text.casefold().split()) for text in example.texts)
        if len(texts) > 1:
            sides[frozenset(texts), 0].add(texts)
            continue
        for number, target in enumerate(example.targets):
            if not math.isnan(target):
                sides[frozenset(texts), number].add(target >= 0.5)

    return len({texts for (texts, _), values in sides.items() if len(values) > 1})


def _require_enough(examples: Sequence[Example], role: str, fewest: int, leaks: int, config: FitConfig) -> None:
    rule = f"leaves {len(examples)} examples for {role}, and at least {fewest} are needed"
    if leaks:
        rule += f" ({leaks} were removed because earlier ones repeat them)"
    require(len(examples) >= fewest, "source", config.source, rule, "give more rows, or change --held-out")


def _require_contrast(examples: Sequence[Example], labelled: Labelled) -> None:
    """Raise InputError when an output has the same label in every training example."""
    if labelled.kind == "pairs":
        return

    for number, label in enumerate(labelled.labels):
        values = {example.targets[number] for example in examples if not math.isnan(example.targets[number])}
        constant = min(values, default=math.nan)
        rule = f"is {constant:g} in every training example"
        if labelled.kind == "classes":
            rule = f"is the class of {'every' if constant == 1 else 'no'} training example"
        remedy = "give rows with other labels"
        require(len(values) > 1, "label_columns", label, rule, remedy)


def _require_held_out_labels(by_role: Mapping[str, Sequence[Example]], labelled: Labelled) -> None:
    """Raise InputError when an output has too few labels to be calibrated or measured."""
    remedy = "give more rows with it, split the rows otherwise, or leave the column out"
    for role in ("validation", "test"):
        for number, label in enumerate(labelled.labels):
            count = sum(not math.isnan(example.targets[number]) for example in by_role[role])
            rule = f"is known for {count} examples for {role}, and at least {_FEWEST[role]} are needed"
            require(count >= _FEWEST[role], "label_columns", label, rule, remedy)
