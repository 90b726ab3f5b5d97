"""What is chosen by free memory, and what happens where it runs out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Make
from detoxrl.config.schema import Config
from detoxrl.models.policy import Policy
from detoxrl.rl.algorithm import Targets
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.runtime.world import World
from detoxrl.training import memory
from detoxrl.training.learner import Learner
from detoxrl.training.memory import MemoryPlan
from learning import PROMPTS, learn, learner_of, loop_config, rollout_of, targets_of, use_sgd

OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:130] . DefaultCPUAllocator: can't allocate memory: you tried to"),
)


def scarce(monkeypatch: pytest.MonkeyPatch, most: int, error: RuntimeError) -> list[int]:
    """Let the losses of more rows than `most` fail; return the list of all sizes asked for."""
    losses = Learner._losses
    seen: list[int] = []

    def failing(
        learner: Learner, prompts: torch.Tensor, rows: torch.Tensor, targets: Targets
    ) -> dict[str, torch.Tensor]:
        seen.append(len(rows))
        if len(rows) > most:
            raise error
        return losses(learner, prompts, rows, targets)

    monkeypatch.setattr(Learner, "_losses", failing)
    return seen


def plan(policy: Policy, folder: RunFolder, config: Config) -> MemoryPlan:
    """The plan that a run in `folder` has stored, or else chooses and stores."""
    world = World()
    stored = MemoryPlan.stored(folder, config, world)
    if stored is not None:
        return stored
    chosen = MemoryPlan.choose(policy, PROMPTS, config, world)
    chosen.save(folder, config, world)
    return chosen


def after_sgd_step(policy: Policy, folder: Path, config: Config, size: int) -> tuple[dict[str, float], torch.Tensor]:
    """The metrics of one update by gradient descent, in microbatches of `size`, and the weights after it."""
    rollout = rollout_of(policy)
    learner = learner_of(policy, folder, config, rollout, microbatch_size=size)
    use_sgd(learner)
    metrics = learner.update(targets_of(rollout), step=0)
    weights = [*policy.parameters(), *policy.add_value_head().parameters()]
    return metrics, torch.cat([weight.detach().flatten() for weight in weights])


def test_free_memory_decides_once_and_the_run_keeps_it(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = RunFolder(tmp_path), loop_config(batch_size=8, minibatch_size=8, microbatch_size=None)
    policy = make_policy("t5", "loaded")
    cross, prompt, activations = memory._update_bytes(policy, PROMPTS[3], config)
    assert prompt == 0
    tokens, layers, width = int(policy.encode([PROMPTS[3].text]).mask.sum()), 2, 32
    assert cross == layers * 2 * tokens * width * 4  # keys and values in float32
    assert activations > layers * 2 * 12 * width * 4
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 3 * activations + 2)  # half of it holds three
    room = plan(policy, folder, config)
    assert room == MemoryPlan(microbatch_size=3, keep_cross=8 * cross < (6 * activations + 2) / 4)
    assert "reads 3 of 8 responses at once" in capsys.readouterr().err
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**40)
    assert plan(policy, folder, config) == room
    asked = replace(config, rl=replace(config.rl, microbatch_size=5))
    assert plan(policy, folder, asked) == MemoryPlan(microbatch_size=5, keep_cross=True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 32 * cross)  # a quarter of it is 8 responses' exactly
    (tmp_path / "memory.json").unlink()
    assert plan(policy, folder, config).keep_cross is False
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    (tmp_path / "memory.json").unlink()
    assert plan(policy, folder, config).microbatch_size == 1


def test_activations_are_recomputed_where_not_even_one_response_fits(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = RunFolder(tmp_path), loop_config(batch_size=8, minibatch_size=8, microbatch_size=None)
    policy = make_policy("gpt2", "loaded")
    kept = memory._update_bytes(policy, PROMPTS[3], config)
    with policy.recomputing(True):
        recomputed = memory._update_bytes(policy, PROMPTS[3], config)
    assert not policy.checkpointing
    assert recomputed.response < kept.response
    assert kept.has_room(kept.response)
    assert not kept.has_room(kept.response - 1)

    for budget, expected in ((kept.response, False), (kept.response - 1, True)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, half=budget: 2 * half)
        (tmp_path / "memory.json").unlink(missing_ok=True)
        chosen = plan(policy, folder, config)
        assert chosen.recompute == expected
        assert MemoryPlan.stored(folder, config, World()) == chosen
        told = "computes activations again in its backward pass, to fit" in " ".join(capsys.readouterr().err.split())
        assert told == expected

    assert chosen.microbatch_size == (kept.response - 1) // recomputed.response
    with policy.recomputing(True):  # It was asked for.
        assert not MemoryPlan.choose(policy, PROMPTS, config, World()).recompute
    stored = json.loads((tmp_path / "memory.json").read_text())
    del stored["recompute"]  # A plan of an earlier version.
    folder.write_json("memory.json", stored)
    assert MemoryPlan.stored(folder, config, World()) == replace(chosen, recompute=False)


def test_processes_agree_on_the_smallest_plan() -> None:
    plans = [MemoryPlan(microbatch_size=size, keep_cross=True, recompute=size == 3) for size in (4, 3, 2)]
    assert plans[0].together_with(plans) == MemoryPlan(microbatch_size=2, keep_cross=True, recompute=True)
    assert plans[0].together_with(plans[:1]) == plans[0]


def test_what_an_update_keeps_grows_with_the_response_and_leaves_weights_out(make_policy: Make) -> None:
    config = loop_config()
    for name, kind in (("t5", "fresh"), ("t5", "full"), ("bart", "fresh"), ("gpt2", "loaded")):
        policy = make_policy(name, kind)
        longer = replace(config, generation=replace(config.generation, max_new_tokens=48))
        (_, _, few), (cross, _, many) = (memory._update_bytes(policy, PROMPTS[3], one) for one in (config, longer))
        assert few < many < 12 * few
        assert (cross > 0) == (name == "t5" and kind != "full")


def test_a_group_shares_the_activations_of_its_prompt(make_policy: Make, tmp_path: Path) -> None:
    policy = make_policy("gpt2", "fresh")
    alone = loop_config(batch_size=8, minibatch_size=8, microbatch_size=None)
    grouped = replace(alone, rl=replace(alone.rl, group_size=4))
    one = memory._update_bytes(policy, PROMPTS[3], alone)
    four = memory._update_bytes(policy, PROMPTS[3], grouped)
    tokens = int(policy.encode([PROMPTS[3].text]).mask.sum())
    length = alone.generation.max_new_tokens
    assert four.prompt + four.response == pytest.approx(one.response, rel=0.2)
    # A response costs its own tokens, and a copy of the prompt's keys and values.
    share = length / (tokens + length)
    assert share * one.response < four.response < (share + 0.35) * one.response

    # Whole groups where they fit, then a part of one: it holds the prompt too.
    of_group = four.prompt + 4 * four.response
    assert [four.fitting(budget, 4) for budget in (2.5 * of_group, of_group, of_group - 1)] == [8, 4, 3]
    assert four.fitting(four.prompt + 2.5 * four.response, 4) == 2
    assert four.fitting(1, 4) == 1

    bonus = replace(grouped, rl=replace(grouped.rl, entropy_coef=0.01))
    assert memory._update_bytes(policy, PROMPTS[3], bonus).response > four.response
    folder = RunFolder(tmp_path)
    plan(policy, folder, alone)
    assert MemoryPlan.stored(folder, alone, World()) is not None
    assert MemoryPlan.stored(folder, grouped, World()) is None
    assert MemoryPlan.stored(folder, replace(alone, rl=replace(alone.rl, entropy_coef=0.01)), World()) is None


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_where_memory_runs_out_microbatches_are_halved_with_the_same_result(
    error: RuntimeError,
    make_policy: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = loop_config(minibatch_size=4, epochs=1, max_grad_norm=1e-3, lr=0.1, value_lr=0.1)
    results = []
    for most, expected_sizes in ((4, [4]), (1, [4, 2, 1, 1, 1, 1])):
        with monkeypatch.context() as patch:
            seen = scarce(patch, most, error)
            metrics, weights = after_sgd_step(make_policy("t5", "loaded"), tmp_path, config, size=4)
        assert seen == expected_sizes
        assert metrics.pop("microbatch_size") == most
        results.append((metrics, weights))

    assert "from now on an update reads 1 responses at once" in " ".join(capsys.readouterr().err.split())
    (whole, expected), (halved, moved) = results
    assert halved == pytest.approx(whole, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_a_minibatch_that_ran_out_half_way_begins_again_from_no_gradient(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loop_config(minibatch_size=4, epochs=1, max_grad_norm=1e-3, lr=0.1, value_lr=0.1)
    _, expected = after_sgd_step(make_policy("t5", "loaded"), tmp_path, config, size=2)

    losses = Learner._losses
    calls = 0

    def late(learner: Learner, prompts: torch.Tensor, rows: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 2:  # The first microbatch has left its gradient.
            raise OUT_OF_MEMORY[0]
        return losses(learner, prompts, rows, targets)

    monkeypatch.setattr(Learner, "_losses", late)
    _, moved = after_sgd_step(make_policy("t5", "loaded"), tmp_path, config, size=2)
    assert calls == 2 + 4
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_at_last_activations_are_recomputed_with_the_same_result(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = loop_config(minibatch_size=4, epochs=1, max_grad_norm=1e-3, lr=0.1, value_lr=0.1)
    _, expected = after_sgd_step(make_policy("t5", "loaded"), tmp_path, config, size=4)

    losses = Learner._losses
    sizes: list[int] = []

    def failing(
        learner: Learner, prompts: torch.Tensor, rows: torch.Tensor, targets: Targets
    ) -> dict[str, torch.Tensor]:
        sizes.append(len(rows))
        if not learner.policy.checkpointing:
            raise OUT_OF_MEMORY[0]
        return losses(learner, prompts, rows, targets)

    monkeypatch.setattr(Learner, "_losses", failing)
    _, moved = after_sgd_step(make_policy("t5", "loaded"), tmp_path, config, size=4)
    assert sizes == [4, 2, 1, 1, 1, 1, 1]
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
    told = " ".join(capsys.readouterr().err.split())
    assert "reads 1 responses at once and computes activations again in its backward pass" in told
    assert json.loads((tmp_path / "memory.json").read_text())["recompute"] is True


def test_one_response_that_does_not_fit_and_other_errors_are_raised(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("t5", "fresh")
    config = loop_config(minibatch_size=4)
    for most, error in ((0, OUT_OF_MEMORY[0]), (1, RuntimeError("sizes do not match"))):
        with monkeypatch.context() as patch:
            scarce(patch, most, error)
            with pytest.raises(RuntimeError, match=str(error)[:9]):
                after_sgd_step(policy, tmp_path, config, size=4)


def test_a_run_keeps_the_halved_size(make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scarce(monkeypatch, 2, OUT_OF_MEMORY[1])
    records = learn(make_policy("t5", "fresh"), tmp_path, loop_config(minibatch_size=4, microbatch_size=None))
    assert [record["microbatch_size"] for record in records] == [2, 2, 2]
    assert seen.count(4) == 1
    assert json.loads((tmp_path / "memory.json").read_text())["microbatch_size"] == 2
