"""How fast could a step be here if it did nothing but its large matrix products, each at the best rate measured?

The leanest step: the encoder is frozen and reads each prompt once, cross-attention's keys and values are made once and
shared by sampling, reference and update, and log-probs are captured while sampling. `flops` counts it. Left out are the
adapter's own products (1 to 2 %), norms, softmax, drawing, the optimizer and all traffic of memory, so that the floor
is too low rather than too high; sampling, whose products are thin, cannot come near the rate of large ones at all.

A worker of benchmarks/step_speed.py: with every line it measures the rates anew, beside the contestants.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from step_case import Step, Task, serve, task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def flops(step: Step, t5: dict[str, Any], roberta: dict[str, Any]) -> dict[str, float]:
    """Return the floating-point operations of the leanest step by stage; a multiply-add is 2.

    `t5` and `roberta` are the settings of the models, as their config.json has them.
    """
    batch, prompt, response = step.batch, step.prompt, step.response
    width, hidden, layers = t5["d_model"], t5["d_ff"], t5["num_layers"]
    inner = t5["num_heads"] * t5["d_kv"]
    read, written = batch * prompt, batch * response
    square = 2 * width * inner  # one projection of one token: q, k, v or o
    ffn = 2 * 3 * width * hidden  # gated: two up, one down
    # Every token of the prompt: q, k, v, o, feed-forward; attention is two products (scores, weighted values) of
    # every pair of tokens.
    encode = layers * (read * (4 * square + ffn) + 2 * 2 * batch * prompt * prompt * inner)
    # Keys and values of the prompt for every decoder layer.
    cross = layers * read * 2 * square
    # Every token of the response: self-attention's q, k, v, o, cross-attention's q and o, feed-forward ...
    linear = layers * written * (4 * square + 2 * square + ffn)
    # ... and what it attends to: itself and the tokens before it (t of them at position t), and the whole prompt.
    itself = layers * 2 * 2 * batch * inner * response * (response + 1) / 2
    across = layers * 2 * 2 * batch * inner * response * prompt
    head = written * 2 * width * t5["vocab_size"]
    forward = linear + itself + across + head
    # Activation gradients alone, as weights are frozen: every linear layer once more, but for the q, k, v of the lowest
    # (below its adapter nothing trains); in self-attention both factors of both products; in cross-attention not the
    # gradient of the keys, which have no adapter.
    backward = linear - written * 3 * square + 2 * itself + 1.5 * across + head
    wide, deep = roberta["hidden_size"], roberta["num_hidden_layers"]
    scored = response + 1  # with the end of the text
    layer = batch * scored * 2 * (4 * wide * wide + 2 * wide * roberta["intermediate_size"])
    score = deep * (layer + 2 * 2 * batch * scored * scored * wide) + batch * 2 * wide * wide  # and one dense layer
    return {
        "encode": encode,
        "sample": cross + forward,
        "log-probs": forward,
        "score": score,
        "update": step.epochs * (forward + backward),
    }


def ways() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Return the ways to compute a linear layer by name: PyTorch's own, and oneDNN's where it is there."""
    found: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"plain": torch.nn.functional.linear}
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if torch.backends.mkldnn.is_available() and wide:
        found["oneDNN"] = lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


@torch.inference_mode()
def rates(step: Step, t5: dict[str, Any], dtype: torch.dtype, seconds: float = 0.4) -> dict[str, float]:
    """Return the best rate (FLOP/s) of each way over the large products of a step, each tried for some time.

    `feed-forward` is the rate of PyTorch's own linear layer on the shape that most of an encoder's time goes to.
    """
    width, hidden, read = t5["d_model"], t5["d_ff"], step.batch * step.prompt
    shapes = [(read, width, width), (read, width, hidden), (read, hidden, width), (read, width, 2 * hidden),
              (step.tokens, width, t5["vocab_size"])]  # fmt: skip
    best: dict[str, float] = {}
    for rows, inside, outside in shapes:
        x, weight = torch.randn(rows, inside).to(dtype), torch.randn(outside, inside).to(dtype)
        for name, linear in ways().items():
            linear(x, weight)
            begun = time.perf_counter()
            while (started := time.perf_counter()) - begun < seconds:
                linear(x, weight)
                rate = 2 * rows * inside * outside / (time.perf_counter() - started)
                best[name] = max(best.get(name, 0.0), rate)
                if name == "plain" and (rows, outside) == (read, hidden):
                    best["feed-forward"] = max(best.get("feed-forward", 0.0), rate)
    return best


def floor(work: dict[str, float], rate: float) -> dict[str, float]:
    """Return the seconds of each stage at a rate (FLOP/s)."""
    return {stage: flop / rate for stage, flop in work.items()}


def stepper(given: Task, seconds: float = 0.4) -> Callable[[int, Step], dict[str, Any]]:
    """Return what measures the rates and gives the floor."""
    torch.set_num_threads(given.threads)
    t5, roberta = (json.loads((Path(given.models) / name / "config.json").read_text()) for name in ("policy", "reward"))

    def run(i: int, step: Step) -> dict[str, Any]:
        work = flops(step, t5, roberta)
        policy = rates(step, t5, DTYPES[given.dtype], seconds)
        stages, plain = floor(work, max(policy.values())), floor(work, policy["feed-forward"])
        rated = {f"{name} GFLOP/s": rate / 1e9 for name, rate in policy.items()}
        return {"seconds": sum(stages.values()), "plain_seconds": sum(plain.values()), "stages": stages,
                "gflop": sum(work.values()) / 1e9, **rated}  # fmt: skip

    return run


def main() -> None:
    given = task(sys.argv[1:])
    serve(given.step, stepper(given))


if __name__ == "__main__":
    main()
