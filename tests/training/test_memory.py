"""What is chosen by free memory, and what happens where it runs out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from conftest import Make
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training import memory
from detoxrl.training import train as train_module
from detoxrl.training.memory import MemoryPlan
from test_invariants import PROMPTS, learn, loop_config, rollout_of, targets_of

OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:130] . DefaultCPUAllocator: can't allocate memory: you tried to"),
)


def scarce(monkeypatch: pytest.MonkeyPatch, most: int, error: RuntimeError) -> list[int]:
    """Let the losses of more rows than `most` fail; return the list of all sizes asked for."""
    losses, seen = train_module._losses, list[int]()

    def failing(*given: object) -> dict[str, torch.Tensor]:
        seen.append(len(given[3]))  # type: ignore[arg-type]
        if seen[-1] > most:
            raise error
        return losses(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(train_module, "_losses", failing)
    return seen


def test_free_memory_decides_once_and_the_run_keeps_it(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = RunFolder(tmp_path), loop_config(batch_size=8, minibatch_size=8, microbatch_size=None)
    policy = make_policy("t5", "loaded")
    cross, activations = memory._bytes_per_response(policy, PROMPTS[3], config)
    tokens, layers, width = int(policy.encode([PROMPTS[3].text]).mask.sum()), 2, 32
    assert cross == layers * 2 * tokens * width * 4  # keys and values in float32
    assert activations > layers * 2 * 12 * width * 4
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 3 * activations + 2)  # half of it holds three
    room = MemoryPlan.of(folder, policy, PROMPTS, config)
    assert room == MemoryPlan(microbatch_size=3, keep_cross=8 * cross < (6 * activations + 2) / 4)
    assert "reads 3 of 8 responses at once" in capsys.readouterr().err
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**40)
    assert MemoryPlan.of(folder, policy, PROMPTS, config) == room
    asked = replace(config, rl=replace(config.rl, microbatch_size=5))
    assert MemoryPlan.of(folder, policy, PROMPTS, asked) == MemoryPlan(microbatch_size=5, keep_cross=True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 32 * cross)  # a quarter of it is 8 responses' exactly
    (tmp_path / "memory.json").unlink()
    assert MemoryPlan.of(folder, policy, PROMPTS, config).keep_cross is False
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    (tmp_path / "memory.json").unlink()
    assert MemoryPlan.of(folder, policy, PROMPTS, config).microbatch_size == 1


def test_what_an_update_keeps_grows_with_the_response_and_leaves_weights_out(make_policy: Make) -> None:
    config = loop_config()
    for name, kind in (("t5", "fresh"), ("t5", "full"), ("bart", "fresh"), ("gpt2", "loaded")):
        policy = make_policy(name, kind)
        longer = replace(config, generation=replace(config.generation, max_new_tokens=48))
        (_, few), (cross, many) = (memory._bytes_per_response(policy, PROMPTS[3], one) for one in (config, longer))
        assert few < many < 12 * few
        assert (cross > 0) == (name == "t5" and kind != "full")


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_where_memory_runs_out_microbatches_are_halved_with_the_same_result(
    error: RuntimeError, make_policy: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, after = loop_config(minibatch_size=4, epochs=1, max_grad_norm=1e-3), []
    for most in (4, 1):
        policy = make_policy("t5", "loaded")
        weights, rollout = [*policy.parameters(), *policy.value_head.parameters()], rollout_of(policy)
        with monkeypatch.context() as patch:
            seen = scarce(patch, most, error)
            found = train_module.update(
                policy, Accelerator(), torch.optim.SGD(weights, lr=0.1), rollout, targets_of(rollout), config, 0, 4
            )
        assert seen == ([4] if most == 4 else [4, 2, 1, 1, 1, 1])
        assert found.pop("microbatch_size") == most
        after.append((found, torch.cat([weight.detach().flatten() for weight in weights])))
    assert "reads 1 responses at once from here on" in capsys.readouterr().err
    (whole, expected), (halved, moved) = after
    assert halved == pytest.approx(whole, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_a_minibatch_that_ran_out_half_way_begins_again_from_no_gradient(
    make_policy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, after = loop_config(minibatch_size=4, epochs=1, max_grad_norm=1e-3), []
    for fails in (False, True):
        policy = make_policy("t5", "loaded")
        weights, rollout = [*policy.parameters(), *policy.value_head.parameters()], rollout_of(policy)
        losses, calls = train_module._losses, 0

        def late(*given: object, fails: bool = fails, losses: object = losses) -> dict[str, torch.Tensor]:
            nonlocal calls
            calls += 1
            if fails and calls == 2:  # the first microbatch has left its gradient
                raise OUT_OF_MEMORY[0]
            return losses(*given)  # type: ignore[operator, no-any-return]

        with monkeypatch.context() as patch:
            patch.setattr(train_module, "_losses", late)
            train_module.update(
                policy, Accelerator(), torch.optim.SGD(weights, lr=0.1), rollout, targets_of(rollout), config, 0, 2
            )
        after.append(torch.cat([weight.detach().flatten() for weight in weights]))
    torch.testing.assert_close(after[1], after[0], rtol=1e-4, atol=1e-6)


def test_one_response_that_does_not_fit_and_other_errors_are_raised(
    make_policy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy("t5", "fresh"), loop_config(minibatch_size=4)
    rollout = rollout_of(policy)
    for most, error in ((0, OUT_OF_MEMORY[0]), (1, RuntimeError("sizes do not match"))):
        optimizer, targets = torch.optim.SGD(policy.parameters(), lr=0.1), targets_of(rollout)
        with monkeypatch.context() as patch:
            scarce(patch, most, error)
            with pytest.raises(RuntimeError, match=str(error)[:9]):
                train_module.update(policy, Accelerator(), optimizer, rollout, targets, config, 0, 4)


def test_a_run_keeps_the_halved_size(make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scarce(monkeypatch, 2, OUT_OF_MEMORY[1])
    records = learn(make_policy("t5", "fresh"), tmp_path, loop_config(minibatch_size=4, microbatch_size=None))
    assert [record["microbatch_size"] for record in records] == [2, 2, 2]
    assert seen.count(4) == 1
    assert json.loads((tmp_path / "memory.json").read_text())["microbatch_size"] == 2


def test_what_is_freed_stays_with_the_process_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()
    code = """
import resource, sys, torch
from detoxrl.training.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed():
    print(-1); sys.exit()
begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""
    faults = [
        int(subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "leave")
    ]
    if faults[0] == -1:
        pytest.skip("no glibc here")
    assert faults[0] < faults[1] / 5
