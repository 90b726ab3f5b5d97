"""Has anything become slower than it was on this kind of processor? Run it by hand, before a release.

    python benchmarks/speed/speed_gate.py            compares, and ends with 1 if a ratio has fallen by more than 10 %
    python benchmarks/speed/speed_gate.py --keep     stores the ratios of this kind of processor in speed_ratios.json

Seconds depend on the machine and on its load; the ratio between a model that is written out and its own forward pass in
transformers, measured in turn (network_speed.py), does not. A ratio that seems to have fallen is measured once more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from detoxrl.models.kernels import kernels
from network_speed import measure_cases

STORED = Path(__file__).with_name("speed_ratios.json")
TOLERANCE = 0.10


def kind_of_processor() -> str:
    """Return what the stored ratios go by."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} with bf16" if kernels().bf16 else capability


def measured_ratios(is_tiny: bool, rounds: int) -> dict[str, float]:
    """Return the ratio of every part of every case: the median of the rounds."""
    ratios = {}
    for row in measure_cases(is_tiny, False, rounds):
        name = f"{row.case.label}: {row.part}"
        ratios[name] = round(median(row.ratios), 3)
        print(f"{ratios[name]:6.2f}  {name}", flush=True)
    return ratios


def fallen(stored: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """Return the names of ratios that have fallen by more than the tolerance, or are no longer measured."""
    return [name for name, ratio in stored.items() if now.get(name, 0.0) < (1 - TOLERANCE) * ratio]


def read_stored() -> dict[str, Any]:
    """Return what is stored for each kind of processor."""
    return dict(json.loads(STORED.read_text(encoding="utf-8"))) if STORED.is_file() else {}


def keep(ratios: Mapping[str, float]) -> None:
    """Store the ratios of this kind of processor."""
    stored = read_stored()
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    stored[kind_of_processor()] = about | {"ratios": dict(ratios)}
    STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"stored for {kind_of_processor()} in {STORED.name}")


def compare(is_tiny: bool, rounds: int) -> list[str]:
    """Print the ratios beside the stored ones; return a line for each that has fallen twice."""
    kind = kind_of_processor()
    stored = read_stored()
    if kind not in stored:
        return [f"nothing is stored for {kind}: run it with --keep"]

    expected = stored[kind]["ratios"]
    now = measured_ratios(is_tiny, rounds)
    if fallen(expected, now):
        print("measuring once more, because a ratio has fallen")
        again = measured_ratios(is_tiny, rounds)
        now = {name: max(ratio, again.get(name, 0.0)) for name, ratio in now.items()}
    return [f"{name}: {expected[name]:.2f} has become {now.get(name, 0.0):.2f}" for name in fallen(expected, now)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--size", default="real", choices=("real", "tiny"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    is_tiny = options.size == "tiny"
    if options.keep:
        keep(measured_ratios(is_tiny, options.rounds))
        return

    lines = compare(is_tiny, options.rounds)
    print("\n".join(lines) if lines else "nothing has become slower")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
