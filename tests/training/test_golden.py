"""The loop's numbers as they once were: a change that moves them has to say so.

`DETOXRL_GOLDEN=write pytest tests/training/test_golden.py` records them again, with the environment they came from.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from conftest import Make, small_config
from learning import learn

GOLDEN = Path(__file__).parent / "golden"
# Without AVX-512, without AVX2 or on one thread the largest drift was 5e-6; a wrong formula moves far more.
MAX_DRIFT, MEAN_DRIFT = 5e-4, 2e-5
# Times, and what is nothing but rounding.
LEFT_OUT = ("seconds", "tokens_per_second", "ratio/first_error")


def environment() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "numpy", "tokenizers")
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def drifts(golden: list[dict[str, float]], found: list[dict[str, float]]) -> dict[str, float]:
    """Return by statistic and step how far it moved, as a share of the statistic's largest value."""
    assert [set(record) for record in found] == [set(record) for record in golden]
    largest = {key: max(abs(record[key]) for record in golden) for key in golden[0]}
    return {
        f"{key} at step {step}": abs(new[key] - old[key]) / max(largest[key], 1e-9)
        for step, (old, new) in enumerate(zip(golden, found, strict=True))
        for key in old
    }


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("name", "kind"), [("t5", "loaded"), ("gpt2", "full")])
def test_the_golden_run_has_not_drifted(name: str, kind: str, make_policy: Make, tmp_path: Path) -> None:
    small = small_config()
    rl = replace(small.rl, steps=6, validate_every=9, lr=3e-3, kl_target=2.0, minibatch_size=4, microbatch_size=3)
    records = learn(make_policy(name, kind), tmp_path, replace(small, seed=4, rl=rl))
    found = [{key: one[key] for key in one if not key.startswith(LEFT_OUT)} for one in records]
    path = GOLDEN / f"{name}_{kind}.json"
    if os.environ.get("DETOXRL_GOLDEN") == "write":
        path.write_text(json.dumps({"environment": environment(), "records": found}, indent=1) + "\n")
    golden = json.loads(path.read_text())
    drift = drifts(golden["records"], found)
    worst = max(drift, key=drift.__getitem__)
    told = f"{worst}: {drift[worst]:.2g}; made in {golden['environment']}, here {environment()}"
    assert drift[worst] < MAX_DRIFT, told
    assert sum(drift.values()) / len(drift) < MEAN_DRIFT, told
