"""How much faster is a model that is written out than its own forward pass in transformers?

    python benchmarks/speed/network_speed.py [--bf16] [--rounds 3] [--size tiny]

The models have random weights and the exact shapes of SmolLM2-135M and FLAN-T5-base, with a LoRA of rank 32 on q and v;
no network is needed. Both networks read the prompts (T5), sample, score under the reference, compute the gradients of
an update in passes of a few groups and, if they have no encoder, those of fine-tuning on pairs of other lengths. They
do it in turn, so that other load on the machine affects both. Seconds are those of the processor, all threads together.
A ratio is of one round; its median and range are shown.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from detoxrl.config.schema import PolicyConfig
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.weights import POLICY
from detoxrl.runtime.allocator import keep_freed_memory
from detoxrl.training.finetune import IGNORED, Tuned, loss_of
from group_case import LORA
from group_worker import make_model
from recipe_memory import SHAPES, save_t5
from step_case import texts
from step_results import median_and_range
from step_worker import TINY_T5


class Case(NamedTuple):
    """A model, how many prompts of how many tokens, and how many responses of how many tokens to each."""

    model: str
    prompts: int
    prompt: int
    group_size: int
    response: int
    shortest: int  # The lengths of responses that are scored and learnt are spread evenly from here to `response`.

    @property
    def label(self) -> str:
        lengths = f"{self.shortest} to {self.response}" if self.shortest < self.response else f"{self.response}"
        return f"{self.model}, {self.prompts} x {self.group_size}, {self.prompt} -> {lengths}"


LLAMA = "SmolLM2-135M"
T5 = "FLAN-T5-base"
CASES = (
    Case(LLAMA, prompts=10, prompt=16, group_size=25, response=20, shortest=20),
    Case(LLAMA, prompts=16, prompt=16, group_size=4, response=20, shortest=20),
    Case(LLAMA, prompts=4, prompt=160, group_size=4, response=48, shortest=48),
    Case(T5, prompts=16, prompt=256, group_size=1, response=64, shortest=64),
    Case(T5, prompts=16, prompt=128, group_size=1, response=64, shortest=16),
)
# Responses in one backward pass, and pairs in one of fine-tuning.
AT_ONCE = 16
WHOLE = "all but fine-tuning"


class Measured(NamedTuple):
    """What a part of a case took in each round, in processor seconds."""

    case: Case
    part: str
    plain: list[float]
    own: list[float]

    @property
    def ratios(self) -> list[float]:
        return [plain / own for plain, own in zip(self.plain, self.own, strict=True)]


def parts(policy: Policy, case: Case) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name, for the network that the policy uses now."""
    prompts = texts(policy.tokenizer.get_vocab(), case.prompt, case.prompts)

    def encode() -> object:
        return policy.with_shared_cross(policy.encode(prompts))

    with torch.no_grad():
        encoded = policy.with_shared_cross(policy.encode(prompts))
    batch = case.prompts * case.group_size
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(batch, case.response, generator=generator)
    ids = torch.randint(40, 200, (batch, case.response), generator=generator)
    lengths = torch.linspace(case.shortest, case.response, batch).round()[torch.randperm(batch, generator=generator)]
    mask = torch.arange(case.response) < lengths[:, None]

    def score() -> object:
        with torch.no_grad():
            return policy.logprobs(encoded, ids, 1.0, None, mask)

    def update() -> None:
        at_once = max(1, AT_ONCE // case.group_size)
        for some in torch.arange(case.prompts).split(at_once):
            first, last = int(some[0]), int(some[-1]) + 1
            rows = slice(first * case.group_size, last * case.group_size)
            part = encoded.row_slice(slice(first, last))
            policy.logprobs(part, ids[rows], 1.0, POLICY, mask[rows]).logprobs.sum().backward()

    timed: dict[str, Callable[[], object]] = {"encode": encode} if policy.has_encoder else {}
    timed |= {"sample": partial(policy.sample, encoded, uniforms, 1.0), "reference": score, "update": update}
    if not policy.has_encoder:
        inputs, labels = pairs(case)
        timed["fine-tune"] = lambda: loss_of(Tuned.of(policy), inputs, labels, bf16=False).backward()
    return timed


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
    """Return the processor seconds of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measured(policy: Policy, case: Case, rounds: int) -> Iterator[Measured]:
    """Yield what each part of a case took, and then all of them that a step of RL has."""
    own_parts = parts(policy, case)
    with policy.through_plain_network():
        plain_parts = parts(policy, case)

    whole = Measured(case, WHOLE, [0.0] * rounds, [0.0] * rounds)
    for name, function in own_parts.items():
        of_part = Measured(case, name, [], [])
        for _ in range(rounds):
            of_part.own.append(seconds(function))
            with policy.through_plain_network():
                of_part.plain.append(seconds(plain_parts[name]))

        yield of_part
        if name != "fine-tune":
            for total, part in ((whole.plain, of_part.plain), (whole.own, of_part.own)):
                total[:] = [before + more for before, more in zip(total, part, strict=True)]
    yield whole


def make_policy(folder: Path, model: str, is_tiny: bool, bf16: bool) -> Policy:
    """Return a policy with random weights that never ends a response. Its model is written to a folder."""
    if model == LLAMA:
        make_model(folder, "tiny" if is_tiny else "smollm2-135m")
        targets: tuple[str, ...] = LORA["targets"]
    else:
        save_t5(folder, TINY_T5 if is_tiny else SHAPES["base"])
        targets = ("q", "v")

    settings = PolicyConfig(
        base=str(folder), bf16=bf16, lora_rank=LORA["r"], lora_alpha=LORA["alpha"], lora_targets=targets
    )
    policy = load_policy(str(folder), None, settings, seed=0)
    policy.eos_token_ids = [-1]
    assert policy.has_fast_network
    return policy


def measure_cases(is_tiny: bool, bf16: bool, rounds: int) -> Iterator[Measured]:
    """Yield what each part of every case took."""
    keep_freed_memory()  # As at the start of every stage of a run.
    for model in dict.fromkeys(case.model for case in CASES):
        with tempfile.TemporaryDirectory() as name:
            policy = make_policy(Path(name), model, is_tiny, bf16)
        for case in CASES:
            if case.model == model:
                yield from measured(policy, case, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="real", choices=("real", "tiny"))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, bf16 {options.bf16}")
    print("| model, prompts x responses, tokens | part | plain, processor s | written out | plain / written out |")
    print("|---|---|--:|--:|--:|")
    for row in measure_cases(options.size == "tiny", options.bf16, options.rounds):
        ratio = median_and_range(row.ratios)
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        times = f"{min(row.plain):.2f} | {min(row.own):.2f}"
        print(f"| {row.case.label} | {row.part} | {times} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
