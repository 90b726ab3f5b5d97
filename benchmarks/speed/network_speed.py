"""How much faster is a causal model that is written out than its own forward pass in transformers?

    python benchmarks/speed/network_speed.py [--bf16] [--rounds 3] [--size tiny]

The model has random weights and the exact shapes of SmolLM2-135M, with a LoRA of rank 32 on q and v; no network is
needed. Both networks sample, score under the reference, and compute the gradients of an update in passes of a few
groups, and of fine-tuning on pairs of other lengths, in turn, so that other load on the machine affects both. A ratio
is of one round; its median and range are shown.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from detoxrl.config.schema import PolicyConfig
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.types import Encoded
from detoxrl.models.weights import POLICY
from detoxrl.training.finetune import IGNORED, Tuned, loss_of
from group_case import LORA
from group_worker import make_model
from step_case import texts
from step_results import median_and_range


class Case(NamedTuple):
    """How many prompts of how many tokens, and how many responses of how many tokens to each."""

    prompts: int
    prompt: int
    group_size: int
    response: int


CASES = (Case(10, 16, 25, 20), Case(16, 16, 4, 20), Case(4, 160, 4, 48))
# Responses in one backward pass, and pairs in one of fine-tuning.
AT_ONCE = 16


def parts(policy: Policy, case: Case) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    encoded = policy.encode(texts(policy.tokenizer.get_vocab(), case.prompt, case.prompts))
    batch = case.prompts * case.group_size
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(batch, case.response, generator=generator)
    ids = torch.randint(3, 200, (batch, case.response), generator=generator)

    def score() -> object:
        with torch.no_grad():
            return policy.logprobs(encoded, ids, 1.0, None)

    def update() -> None:
        prompts = max(1, AT_ONCE // case.group_size)
        for start in range(0, case.prompts, prompts):
            some: Encoded = encoded.row_slice(slice(start, start + prompts))
            rows = slice(start * case.group_size, (start + prompts) * case.group_size)
            policy.logprobs(some, ids[rows], 1.0, POLICY).logprobs.sum().backward()

    inputs, labels = pairs(case)

    def fine_tune() -> None:
        loss_of(Tuned.of(policy), inputs, labels, bf16=False).backward()

    sample = partial(policy.sample, encoded, uniforms, 1.0)
    return {"sample": sample, "reference": score, "update": update, "fine-tune": fine_tune}


def pairs(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    """Return input ids and labels of pairs whose prompts and targets have half to one and a half times the tokens."""
    rng = random.Random(0)
    inputs = []
    labels = []
    for _ in range(AT_ONCE):
        prompt = rng.choices(range(3, 200), k=rng.randint(case.prompt // 2, 3 * case.prompt // 2))
        target = rng.choices(range(3, 200), k=rng.randint(case.response // 2, 3 * case.response // 2))
        inputs.append(prompt + target)
        labels.append([IGNORED] * len(prompt) + target)
    return inputs, labels


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(policy: Policy, case: Case, rounds: int) -> None:
    """Print a row of the table for each part of a case."""
    for name, function in parts(policy, case).items():
        own: list[float] = []
        plain: list[float] = []
        for _ in range(rounds):
            own.append(seconds(function))
            with policy.through_plain_network():
                plain.append(seconds(function))

        ratio = median_and_range([theirs / ours for theirs, ours in zip(plain, own, strict=True)])
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        shape = f"{case.prompts} x {case.group_size}, {case.prompt} -> {case.response}"
        print(f"| {shape} | {name} | {min(plain):.2f} | {min(own):.2f} | {spread} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="smollm2-135m", choices=("smollm2-135m", "tiny"))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), options.size)
        settings = PolicyConfig(
            base=name, bf16=options.bf16, lora_rank=LORA["r"], lora_alpha=LORA["alpha"], lora_targets=LORA["targets"]
        )
        policy = load_policy(name, None, settings, seed=0)
        assert policy.has_fast_network

        print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, bf16 {options.bf16}")
        print("| prompts x responses, tokens | part | plain, s | written out, s | plain / written out |")
        print("|---|---|--:|--:|--:|")
        for case in CASES:
            measure(policy, case, options.rounds)


if __name__ == "__main__":
    main()
