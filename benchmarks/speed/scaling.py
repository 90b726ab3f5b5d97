"""How much speed is lost when several processes share a run? Measured here, and estimated for FLAN-T5 XXL.

    python benchmarks/speed/scaling.py measure --threads 2 --pairs 3 -- quickstart --rl.steps 8 --rl.batch-size 64
    python benchmarks/speed/scaling.py estimate

`measure` trains the same run with one process of T threads and with two of T/2 threads, in turn and on the same cores.
An efficiency of 1 means that sharing costs nothing. The arguments behind `--` are those of `detoxrl prepare`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import numpy as np
from scipy.stats import binom, norm

STAGES = ("sample", "score", "update", "step")


def detoxrl(threads: int, *arguments: str, processes: int = 1) -> None:
    """Run a command of detoxrl in one process, or in several that torchrun starts."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*launcher, "detoxrl", *arguments], env=environment, check=True, capture_output=True)


def train(prepared: Path, folder: Path, threads: int, processes: int) -> dict[str, float]:
    """Train a copy of a prepared run; return the mean seconds per step by stage, without the first step."""
    copytree(prepared, folder)
    detoxrl(threads, "train", str(folder), processes=processes)

    machine = json.loads((folder / "run.json").read_text())["machine"]
    if (machine["processes"], machine["threads"]) != (processes, threads):
        sys.exit(f"trained with {machine['processes']} processes of {machine['threads']} threads")

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    return {stage: float(np.mean([line[f"seconds/{stage}"] for line in lines])) for stage in STAGES}


def measure(threads: int, pairs: int, arguments: Sequence[str]) -> None:
    """Print the seconds of each stage with one and with two processes, and the efficiency, over alternated runs."""
    seconds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as work:
        prepared = Path(work, "prepared")
        detoxrl(threads, "prepare", *arguments, "--run-dir", str(prepared))
        detoxrl(threads, "sft", str(prepared))

        for pair in range(pairs):
            for processes in (1, 2) if pair % 2 == 0 else (2, 1):
                folder = Path(work, f"{pair}-{processes}")
                seconds[processes].append(train(prepared, folder, threads // processes, processes))

    print(f"| seconds a step | 1 x {threads} threads | 2 x {threads // 2} threads | efficiency, median (range) |")
    print("|---|---:|---:|---:|")
    for stage in STAGES:
        alone = np.array([run[stage] for run in seconds[1]])
        shared = np.array([run[stage] for run in seconds[2]])
        ratios = alone / shared
        spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        print(f"| {stage} | {np.median(alone):.3f} | {np.median(shared):.3f} | {spread} |")


@dataclass(frozen=True)
class Assumptions:
    """The inputs of the estimate."""

    # FLAN-T5 XXL.
    width: int = 4096
    inner: int = 10240
    layers: int = 24
    vocabulary: int = 32128
    rank: int = 32
    # The run.
    prompt: int = 512
    most: int = 128  # generation.max_new_tokens
    mean: float = 40.0  # Tokens of a response, and their standard deviation.
    deviation: float = 15.0
    epochs: int = 2
    minibatches: int = 4
    # An H100 and its network.
    flops: float = 0.4 * 990e12  # 40 % of what bf16 may reach.
    token_seconds: float = 10e-3  # A sampled token: 3.8 ms to read 12.7 GB of weights; Python and launches.
    wire: float = 50e9  # Bytes a second of a 400 Gb/s port.
    inside: float = 300e9  # Of NVLink, as NCCL reaches it.
    hop: float = 10e-6  # Seconds a hop of a ring of NCCL, and of gloo over TCP.
    gloo_hop: float = 50e-6
    gloo_wire: float = 1e9


def expected_largest(count: int, mean: float, deviation: float) -> float:
    """Return the expected largest of `count` normal values (Blom 1958)."""
    return mean + deviation * float(norm.ppf((count - 0.375) / (count + 0.25)))


def estimate_step(a: Assumptions, processes: int, rows: int) -> dict[str, float]:
    """Return the seconds of a step on `processes` GPUs with `rows` responses in all, and the megabytes sent."""
    encoder = a.layers * (4 * a.width**2 + 3 * a.width * a.inner)
    decoder = a.layers * (8 * a.width**2 + 3 * a.width * a.inner) + a.vocabulary * a.width
    adapter = a.layers * 4 * 2 * a.width * a.rank + a.width + 1

    own_rows = max(1.0, rows / processes)
    longest = min(a.most, expected_largest(rows, a.mean, a.deviation))
    encode = 2 * encoder * a.prompt * own_rows / a.flops
    decode = longest * a.token_seconds + 2 * decoder * a.mean * own_rows / a.flops
    sample = encode + decode
    update = sum(estimate_epoch(a, processes, rows, epoch, decoder) for epoch in range(a.epochs))

    gradients = 4.0 * adapter
    line = a.inside if processes <= 8 else a.wire
    ring = 2 * (processes - 1) / processes * gradients / line + 2 * (processes - 1) * a.hop
    reduce = a.epochs * a.minibatches * ring if processes > 1 else 0.0

    gathered = rows * (21.0 * a.most + 600)
    gathers = gathered / a.gloo_wire + 12 * 2 * (processes - 1) * a.gloo_hop if processes > 1 else 0.0
    gathers += a.epochs * a.minibatches * float(np.ceil(np.log2(processes))) * a.gloo_hop  # a barrier before each sum
    return {
        "sample": sample,
        "update": update,
        "reduce": reduce,
        "gathers": gathers,
        "step": sample + update + reduce + gathers,
        "gradient MB": gradients / 1e6,
        "gathered MB": gathered / 1e6,
    }


def estimate_epoch(a: Assumptions, processes: int, rows: int, epoch: int, decoder: int) -> float:
    """Return the seconds of one epoch of updates, for the process with the most tokens."""
    share = rows / a.minibatches / processes
    if processes == 1:
        return a.minibatches * 4 * decoder * a.mean * share / a.flops

    # The first epoch is dealt evenly. Later ones draw new minibatches, and rows stay where their prompt is encoded.
    most_rows = max(1.0, np.ceil(share))
    if epoch > 0:
        quantile = (processes - 0.375) / (processes + 0.25)
        most_rows = max(1.0, float(binom.ppf(quantile, rows // a.minibatches, 1 / processes)))
    tokens = expected_largest(processes, a.mean * most_rows, a.deviation * most_rows**0.5)
    return float(a.minibatches * 4 * decoder * tokens / a.flops)


def estimate(a: Assumptions) -> None:
    """Print weak scaling (64 responses per GPU) and strong scaling (512 in all)."""
    for name in ("weak", "strong"):
        alone = estimate_step(a, 1, 64 if name == "weak" else 512)["step"]
        print(f"\n| {name}: GPUs | sample | update | gradients | gathers | step | efficiency |")
        print("|---:|---:|---:|---:|---:|---:|---:|")
        for processes in (1, 8, 16, 32, 64, 128, 256, 512):
            step = estimate_step(a, processes, 64 * processes if name == "weak" else 512)
            ideal = alone if name == "weak" else alone / processes
            seconds = " | ".join(f"{step[part]:.2f}" for part in ("sample", "update", "reduce", "gathers", "step"))
            print(f"| {processes} | {seconds} | {ideal / step['step']:.0%} |")
    step = estimate_step(a, 8, 512)
    print(f"\na gradient: {step['gradient MB']:.1f} MB; gathered for 512 responses: {step['gathered MB']:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "estimate"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--pairs", type=int, default=3)
    own, _, arguments = " ".join(sys.argv[1:]).partition(" -- ")
    options = parser.parse_args(own.split())
    if options.what == "estimate":
        estimate(Assumptions())
    else:
        measure(options.threads, options.pairs, arguments.split() or ["quickstart"])


if __name__ == "__main__":
    main()
