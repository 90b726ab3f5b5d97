"""Draws are a function of (seed, stream, step, prompt id, sample index) and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from detoxrl.runtime.randomness import batch_indices, digest, permutation, torch_seed, uniforms


def test_a_row_draws_the_same_in_any_batch_and_a_longer_draw_starts_the_same() -> None:
    batch = uniforms(0, "rollout", 3, ["a", "b", "c"], 1, 8)
    assert np.array_equal(uniforms(0, "rollout", 3, ["b"], 1, 8)[0], batch[1])
    assert np.array_equal(uniforms(0, "rollout", 3, ["c"], 1, 20)[0, :8], batch[2])


@pytest.mark.parametrize(
    "other", [(1, "rollout", 3, "a", 0), (0, "evaluation", 3, "a", 0), (0, "rollout", 4, "a", 0),
              (0, "rollout", 3, "b", 0), (0, "rollout", 3, "a", 1)]
)  # fmt: skip
def test_every_coordinate_matters(other: tuple[int, str, int, str, int]) -> None:
    seed, stream, step, prompt, sample = other
    draws = uniforms(0, "rollout", 3, ["a"], 0, 16)
    other_draws = uniforms(seed, stream, step, [prompt], sample, 16)
    assert not np.isclose(draws, other_draws).any()


def test_draws_are_uniform() -> None:
    values = uniforms(0, "test", 0, [str(i) for i in range(2000)], 0, 8)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.1


def test_these_draws_never_change_so_that_old_runs_can_be_repeated() -> None:
    assert digest("detoxrl") == 16287801504240873280
    assert uniforms(1, "rollout", 2, ["train_3"], 4, 2)[0].tolist() == pytest.approx(
        [0.7466789773019289, 0.4921103744973928]
    )


def test_batches_cover_all_rows_before_any_row_repeats() -> None:
    first = [row for step in range(3) for row in batch_indices(0, "prompts", step, 4, 12)]
    assert sorted(first) == list(range(12))
    second = [row for step in range(3, 6) for row in batch_indices(0, "prompts", step, 4, 12)]
    assert sorted(second) == list(range(12))
    assert first != second
    assert sorted(permutation(0, "x", 0, 5)) == [0, 1, 2, 3, 4]


def test_a_batch_may_span_two_passes() -> None:
    assert len(batch_indices(0, "prompts", 1, 8, 12)) == 8


def test_torch_seeds_differ_by_stream() -> None:
    assert torch_seed(0, "lora") != torch_seed(0, "reward model")
    assert 0 <= torch_seed(0, "lora") < 2**63
