"""Are the fastest kernels of a machine found, remembered, and used until others are chosen?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from detoxrl.models import kernels as module
from detoxrl.models.kernels import PUBLIC, Kernels, kernels, measured_kernels, use_kernels, using_kernels

FOUND = Kernels(onednn=True, packed=False, bf16=True)


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Make this process one that has not asked for kernels yet; the list grows when they are timed."""
    calls: list[None] = []

    def measured() -> Kernels:
        calls.append(None)
        return FOUND

    monkeypatch.setenv("DETOXRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "measured_kernels", measured)
    monkeypatch.setattr(module, "_in_use", None)
    return calls


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one that has not asked for kernels yet."""
    monkeypatch.setattr(module, "_in_use", None)


def busy(seconds: float) -> Callable[[], None]:
    """Return a function that takes some processor time."""

    def work() -> None:
        started = time.thread_time()
        while time.thread_time() - started < seconds:
            pass

    return work


def test_a_kernel_is_faster_only_by_the_gain_that_is_asked_for() -> None:
    assert module._is_faster(busy(0.002), busy(0.004), gain=1.5)
    assert not module._is_faster(busy(0.002), busy(0.004), gain=2.5)
    assert not module._is_faster(busy(0.004), busy(0.002), gain=1.0)


def test_waiting_is_not_counted() -> None:
    assert module._is_faster(lambda: time.sleep(0.01), busy(0.001), gain=1.0)


def test_each_answer_comes_from_its_own_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    for answers in ((True, False, False), (False, True, False), (False, False, True)):
        remaining = list(answers)
        monkeypatch.setattr(module, "_is_faster", lambda kernel, public, gain, left=remaining: left.pop(0))
        assert measured_kernels() == Kernels(*answers)


def test_timing_leaves_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert isinstance(measured_kernels(), Kernels)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_kernels_that_are_compared_give_the_same_product() -> None:
    x = torch.randn(5, 32)
    weight = torch.randn(16, 32)
    bias = torch.randn(16)
    expected = torch.nn.functional.linear(x, weight, bias)
    for layout in (weight, module.onednn_layout(weight, 5)):
        torch.testing.assert_close(module.onednn_linear(x, layout, bias), expected)


def test_a_machine_is_timed_once(timed: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert kernels() == FOUND
    forget(monkeypatch)
    assert kernels() == FOUND
    assert len(timed) == 1


def test_another_limit_of_onednn_is_another_machine(timed: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels()
    forget(monkeypatch)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    kernels()
    assert len(timed) == 2
    for limit in ("SSE41", ""):
        forget(monkeypatch)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        if not limit:
            monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
        kernels()
    assert len(timed) == 2


@pytest.mark.parametrize("damaged", ["{", "[]", '{"it": 1}', '{"it": {"onednn": true}}', "\udcff"])
def test_a_damaged_memory_is_written_anew(
    timed: list[None], damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache" / "kernels.json"
    path.parent.mkdir()
    path.write_bytes(damaged.encode("utf-8", "surrogateescape"))
    assert kernels() == FOUND
    assert list(json.loads(path.read_text()).values()) == [asdict(FOUND)]
    forget(monkeypatch)
    assert kernels() == FOUND
    assert len(timed) == 1


def test_without_a_cache_each_process_times(timed: list[None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DETOXRL_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert kernels() == FOUND
        forget(monkeypatch)
    assert len(timed) == 2


def test_others_are_used_until_the_end_of_a_block(timed: list[None]) -> None:
    with pytest.raises(ZeroDivisionError), using_kernels(PUBLIC):
        _ = 1 / int(kernels() != PUBLIC)
    assert kernels() == FOUND
    use_kernels(PUBLIC)
    assert kernels() == PUBLIC
    assert len(timed) == 1
