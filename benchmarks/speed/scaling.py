"""How much is lost when processes share a run? Measured here, and foretold for a model of 11 billion weights.

    python benchmarks/scaling.py measure --threads 2 --pairs 3 -- quickstart --rl.steps 8 --rl.batch-size 64
    python benchmarks/scaling.py shard --threads 2 --pairs 3 -- quickstart --rl.steps 8 --rl.batch-size 64
    python benchmarks/scaling.py foretell

`measure` trains the same run with one process of T threads and with two of T/2, in turn: the cores are the same, so
1 is what sharing costs nothing. `shard` trains it with two that hold the base each, and with two that hold it together
under FSDP. Words behind `--` are those of `detoxrl prepare`.
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
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def detoxrl(threads: int, *words: str, **variables: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **variables}
    subprocess.run([sys.executable, "-m", "detoxrl", *words], env=environment, check=True, capture_output=True)


def trained(prepared: Path, folder: Path, threads: int, number: int, **variables: str) -> dict[str, float]:
    """Return the mean seconds of a step by stage, the first step left out, in `number` processes."""
    copytree(prepared, folder)
    detoxrl(threads, "train", str(folder), "--num-processes", str(number), **variables)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    return {stage: float(np.mean([line[f"seconds/{stage}"] for line in lines])) for stage in STAGES}


def measure(threads: int, pairs: int, words: Sequence[str], shard: bool) -> None:
    """Print the seconds of each stage in the two ways to compare, and their ratio, over alternated runs."""
    ways = [(f"1 x {threads} threads", 1, {}), (f"2 x {threads // 2} threads", 2, {})]
    if shard:
        ways = [("2, each holds the base", 2, {}), ("2 hold it together", 2, FSDP)]
    found: list[list[dict[str, float]]] = [[], []]
    with tempfile.TemporaryDirectory() as place:
        prepared = Path(place, "prepared")
        detoxrl(threads, "prepare", *words, "--run-dir", str(prepared))
        detoxrl(threads, "sft", str(prepared))
        for pair in range(pairs):
            for way in (0, 1) if pair % 2 == 0 else (1, 0):
                _, number, variables = ways[way]
                found[way].append(trained(prepared, Path(place, f"{pair}-{way}"), threads, number, **variables))
    print(f"| seconds a step | {ways[0][0]} | {ways[1][0]} | ratio |\n|---|---:|---:|---:|")
    for stage in STAGES:
        one, two = (np.array([run[stage] for run in of_way]) for of_way in found)
        ratios = one / two
        spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        print(f"| {stage} | {np.median(one):.3f} | {np.median(two):.3f} | {spread} |")


@dataclass(frozen=True)
class Assumed:
    """What the arithmetic rests on; each number may be given another value."""

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


def largest(number: int, mean: float, deviation: float) -> float:
    """Return what the largest of `number` normal values is expected to be (Blom 1958)."""
    return mean + deviation * float(norm.ppf((number - 0.375) / (number + 0.25)))


def foretell_step(a: Assumed, processes: int, rows: int) -> dict[str, float]:
    """Return seconds of a step on so many GPUs with `rows` responses in all, and bytes on the wire."""
    encoder = a.layers * (4 * a.width**2 + 3 * a.width * a.inner)
    decoder = a.layers * (8 * a.width**2 + 3 * a.width * a.inner) + a.vocabulary * a.width
    adapter = a.layers * 4 * 2 * a.width * a.rank + a.width + 1
    own = max(1.0, rows / processes)
    longest = min(a.most, largest(rows, a.mean, a.deviation))
    sample = 2 * encoder * a.prompt * own / a.flops + longest * a.token_seconds + 2 * decoder * a.mean * own / a.flops
    share, seconds = rows / a.minibatches / processes, 0.0
    for epoch in range(a.epochs):
        # The first pass is dealt evenly; later ones draw minibatches anew, and rows stay where their prompt is encoded.
        likely = (processes - 0.375) / (processes + 0.25)
        drawn = float(binom.ppf(likely, rows // a.minibatches, 1 / processes)) if processes > 1 else share
        most_rows = max(1.0, np.ceil(share)) if epoch == 0 else max(1.0, drawn)
        tokens = (
            largest(processes, a.mean * most_rows, a.deviation * most_rows**0.5) if processes > 1 else a.mean * share
        )
        seconds += a.minibatches * 4 * decoder * tokens / a.flops
    gradients = 4.0 * adapter
    line = a.inside if processes <= 8 else a.wire
    ring = 2 * (processes - 1) / processes * gradients / line + 2 * (processes - 1) * a.hop
    reduce = a.epochs * a.minibatches * ring if processes > 1 else 0.0
    gathered = rows * (21.0 * a.most + 600)
    talk = gathered / a.gloo_wire + 12 * 2 * (processes - 1) * a.gloo_hop if processes > 1 else 0.0
    talk += a.epochs * a.minibatches * float(np.ceil(np.log2(processes))) * a.gloo_hop  # They meet before each sum.
    whole = sample + seconds + reduce + talk
    return {"sample": sample, "update": seconds, "reduce": reduce, "talk": talk, "step": whole,
            "gradient MB": gradients / 1e6, "gathered MB": gathered / 1e6}  # fmt: skip


def foretell(a: Assumed) -> None:
    """Print weak scaling (64 responses a GPU) and strong scaling (512 in all)."""
    for name, rows_of in (("weak", lambda n: 64 * n), ("strong", lambda n: 512)):
        alone = foretell_step(a, 1, rows_of(1))["step"]
        print(f"\n| {name}: GPUs | responses | sample | update | gradients | gathers | step, s | efficiency |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|")
        for number in (1, 8, 16, 32, 64, 128, 256, 512):
            found = foretell_step(a, number, rows_of(number))
            ideal = alone if name == "weak" else alone / number
            parts = " | ".join(f"{found[part]:.2f}" for part in ("sample", "update", "reduce", "talk", "step"))
            print(f"| {number} | {rows_of(number)} | {parts} | {ideal / found['step']:.0%} |")
    one = foretell_step(a, 8, 512)
    print(f"\na gradient: {one['gradient MB']:.1f} MB; gathered of 512 responses: {one['gathered MB']:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "shard", "foretell"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--pairs", type=int, default=3)
    own, _, words = " ".join(sys.argv[1:]).partition(" -- ")
    given = parser.parse_args(own.split())
    if given.what == "foretell":
        foretell(Assumed())
    else:
        measure(given.threads, given.pairs, words.split() or ["quickstart"], given.what == "shard")


if __name__ == "__main__":
    main()
