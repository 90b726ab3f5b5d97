"""Made-up rows in the layout of each set that benchmarks/evaluation/judges.py reads, and a judge that is known."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detoxrl.evaluation.statistics import Floats
from judge_speed import distinct_texts
from judged_sets import PERSPECTIVE_SCORES

Rows = Sequence[dict[str, Any]]


def first_number(texts: Sequence[str]) -> Floats:
    """A judge: the number with which a text begins, such as that of "0.7 stupid"."""
    return np.array([float(text.split()[0]) for text in texts])


def write_split(root: Path, folder: str, split: str, rows: Rows) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    with gzip.open(root / folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


SPLITS: dict[tuple[str, str], Rows] = {
    ("davidson", "train"): [
        {"class": 0, "tweet": "0.9 hate"},
        {"class": 1, "tweet": "0.4 offensive"},
        {"class": 2, "tweet": "0.1 neither"},
    ],
    ("surge_toxicity", "train"): [
        {"text": "0.9 stupid", "label": "toxic"},
        {"text": "0.4 silly", "label": "toxic"},
        {"text": "0.6 fine", "label": "not_toxic"},
        {"text": "0.1 good", "label": "not_toxic"},
        {"text": "0.1 good", "label": "not_toxic"},
    ],
    ("toxigen_demonstrations", "train"): [
        {"text": "0.7 they again", "label": "hate", "group": "tall"},
        {"text": "0.2 they came", "label": "neutral", "group": "tall"},
        {"text": "0.3 them again", "label": "hate", "group": "left-handed"},
        {"text": "0.8 them too", "label": "neutral", "group": "left-handed"},
        {"text": "0.1 them all", "label": "neutral", "group": "left-handed"},
    ],
    ("paradetox", "train"): [
        {"en_toxic_comment": "0.8 a dumb idea", "en_neutral_comment": "0.2 a bad idea"},
        {"en_toxic_comment": "0.8 a dumb idea", "en_neutral_comment": "0.1 a weak idea"},
    ],
    ("dynabench_hate", "dev"): [
        {"text": "0.5 go away", "label": "hate", "split": "dev"},
        {"text": "0.5 come in", "label": "nothate", "split": "dev"},
    ],
    ("toxichat", "train"): [
        {"turns": [{"text": "0.2 hello", "offensive": False}, {"text": "0.9 fool", "offensive": True}]},
    ],
    ("toxichat", "validation"): [{"turns": [{"text": "0.3 why", "offensive": False}]}],
    ("toxichat", "test"): [{"turns": [{"text": "0.1 because", "offensive": False}]}],
    ("diasafety", "test"): [
        {"context": "0.1 shall I?", "response": "0.6 do it", "category": "Risk", "label": "Unsafe"},
        {"context": "0.7 shall I?", "response": "0.5 ask first", "category": "Risk", "label": "Safe"},
        {"context": "0.7 shall I?", "response": "", "category": "Risk", "label": "Safe"},
    ],
    ("convabuse", "train"): [{"user": "0.9 stupid bot", "is_abuse_majority": True}],
    ("convabuse", "validation"): [{"user": "0.2 what time is it", "is_abuse_majority": False}],
    ("convabuse", "test"): [{"user": "0.1 thanks", "is_abuse_majority": False}],
}


def write_sets(root: Path) -> Path:
    """Write every set with labels of people."""
    for (folder, split), rows in SPLITS.items():
        write_split(root, folder, split, rows)
    return root


def scored_rows(size: int) -> list[dict[str, Any]]:
    """Return rows of RealToxicityPrompts: all of Perspective's scores of a text are the number it begins with."""
    texts = distinct_texts(2 * size, 5)
    scores = [round((37 * i % 100) / 100, 2) for i in range(2 * size)]
    halves = [
        {"text": f"{score} {text}", **dict.fromkeys(PERSPECTIVE_SCORES, score)}
        for text, score in zip(texts, scores, strict=True)
    ]
    return [{"prompt": halves[2 * i], "continuation": halves[2 * i + 1]} for i in range(size)]
