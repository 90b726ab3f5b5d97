"""What happens to freed memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from detoxrl.runtime import allocator


def test_what_is_freed_stays_with_the_process_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
    code = """
import resource, sys, torch
import detoxrl.training.train
from detoxrl.runtime.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
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
