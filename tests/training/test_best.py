"""Which policy is kept, when training no longer pays, and where score and judge part: on series made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detoxrl.config.schema import RlConfig
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training.best import BestCheckpoint, best_validation, divergence
from detoxrl.training.validation import Validation
from test_run_folder import FakePolicy

Points = list[tuple[float, float, float]]
MARGIN = 0.01


def series(points: Points, error: float = 0.01) -> list[Validation]:
    """Validations every five steps, from (score, toxicity, quality)."""
    return [
        Validation(step=5 * i, toxicity=t, toxicity_error=error, quality=q, length=20, score=s, kl=float(i))
        for i, (s, t, q) in enumerate(points)
    ]


@pytest.mark.parametrize(
    ("points", "step"),
    [
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, 0.2, 0.9), (3, 0.25, 0.9)], 10),  # gamed from right after the least toxic
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, 0.11, 0.9), (3, 0.2, 0.9), (4, 0.2, 0.9)], 15),  # 0.11 is within the error
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, 0.2, 0.9), (3, 0.11, 0.9), (4, 0.2, 0.9), (5, 0.2, 0.9)], 20),  # it lasts
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, 0.2, 0.9), (3, 0.2, 0.9), (4, 0.11, 0.9)], None),  # they met again
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, 0.2, 0.9)], None),  # one validation may be luck
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (1, 0.2, 0.9), (1, 0.2, 0.9)], None),  # a score that is as high pleads nothing
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (0.5, 0.2, 0.9), (0.5, 0.3, 0.9)], None),  # both say worse: it is honest
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, 0.05, 0.8), (3, 0.0, 0.7)], 10),  # civil, but it lost its facts
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, 0.05, 0.8), (3, 0.2, 0.9)], 10),  # one way of being worse, then the other
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, 0.09, 0.89), (3, 0.08, 0.89)], None),  # at the bound is within it
        ([(0, 0.1, 0.9), (1, 0.2, 0.9), (2, 0.2, 0.9)], 5),  # nothing was better than the start
        ([(0, 0.1, 0.9), (1, 0.1, 0.9), (2, 0.1, 0.9)], None),  # a judge that does not move
        ([(0, 0.3, 0.9), (1, 0.2, 0.9), (2, 0.1, 0.9)], None),  # all is well to the end
        ([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, 0.1, 0.9), (3, 0.2, 0.9), (4, 0.2, 0.9)], 15),  # a tie for the least toxic
        ([(0, 0.3, 0.9)], None),
    ],
)
def test_score_and_judge_part_where_one_says_better_and_the_other_worse_to_the_end(
    points: Points, step: int | None
) -> None:
    found = divergence(series(points), MARGIN)
    assert (found and found.step) == step


@pytest.mark.parametrize(
    ("quality_by", "loss", "step"),
    [
        ("facts", 0.008, 1),  # about the noise of a validation
        ("facts", 0.012, 0),
        ("rouge_l", 0.012, 0),
        ("corpus_distinct_2", 0.078, 1),
        ("corpus_distinct_2", 0.082, 0),
        ("source_chrf", 0.098, 1),
        ("source_chrf", 0.102, 0),
    ],
)
def test_how_much_quality_may_be_lost_follows_from_its_measure(
    tmp_path: Path, quality_by: str, loss: float, step: int
) -> None:
    best = BestCheckpoint(RunFolder(tmp_path), RlConfig(), quality_by)
    for validation in series([(0, 0.3, 0.9), (1, 0.1, 0.9 - loss)]):
        best.offer(FakePolicy(str(validation.step)), validation)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "checkpoint.json").read_text())["kept_step"] == 5 * step


@pytest.mark.parametrize(("toxicity", "parted"), [(0.113, False), (0.115, True)])
def test_a_parting_is_more_than_one_standard_error_of_the_difference(toxicity: float, parted: bool) -> None:
    # Two means with errors of 0.01 differ by 0.0141 for one standard error.
    found = divergence(series([(0, 0.3, 0.9), (1, 0.1, 0.9), (2, toxicity, 0.9), (3, toxicity, 0.9)]), MARGIN)
    assert (found is not None) is parted


def offer(folder: Path, points: Points, rl: RlConfig, again: bool = False) -> list[int | None]:
    """Offer each validation, with `again` to a keeper that recalls what was seen; return stopped_step after each."""
    best, stopped = BestCheckpoint(RunFolder(folder), rl, "facts"), []
    for one in series(points):
        if again:
            seen = json.loads(json.dumps(best.state()))
            best = BestCheckpoint(RunFolder(folder), rl, "facts")
            assert best.stopped_step is None  # nothing seen, nothing to stop
            best.restore(seen)
        best.offer(FakePolicy(str(one.step)), one)  # type: ignore[arg-type]
        stopped.append(best.stopped_step)
    return stopped


@pytest.mark.parametrize("again", [False, True], ids=["at once", "resumed"])
def test_patience_ends_after_so_many_validations_that_brought_nothing_better(tmp_path: Path, again: bool) -> None:
    points = [(0, 0.3, 0.9), (0, 0.3, 0.8), (1, 0.1, 0.9), (2, 0.2, 0.9), (3, 0.09, 0.8), (4, 0.2, 0.9)]
    assert offer(tmp_path, points, RlConfig(patience=2), again) == [None, None, None, None, 20, 25]
    found = json.loads((tmp_path / "checkpoint.json").read_text())
    assert (found["kept_step"], found["parted_step"], found["stopped_step"]) == (10, 15, 25)
    assert (found["kept"]["score"], found["start"]["kl"]) == (1, 0.0)
    assert offer(tmp_path, points, RlConfig(), again) == [None] * 6
    found = json.loads((tmp_path / "checkpoint.json").read_text())
    assert (found["kept_step"], found["stopped_step"]) == (10, None)
    # The last step of all is no early one.
    assert offer(tmp_path, points, RlConfig(patience=2, steps=25), again)[-1] is None


def test_what_is_kept_is_a_matter_of_the_series_alone() -> None:
    points = [(0, 0.3, 0.9), (1, 0.103, 0.9), (2, 0.1, 0.891), (3, 0.09, 0.891), (4, 0.0, 0.8)]
    kept = [best_validation(series(points, 0.005)[: i + 1], MARGIN).step for i in range(5)]
    assert kept == [0, 5, 5, 15, 15]
