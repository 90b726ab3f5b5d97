"""How fast could a step be if it did only its large matrix products, each at the best measured rate?

The leanest step: the frozen encoder reads each prompt once; the keys and values of cross-attention are computed once
and shared by sampling, reference and update; log-probs are recorded while sampling. `flops` counts its operations. Not
counted are the adapter's own products (1 to 2 %), norms, softmax, drawing of tokens, the optimizer and all memory
traffic, so the floor is too low rather than too high. The thin products of sampling cannot come near the rate of large
ones.

A worker that step_speed.py starts: for every line it measures the rates again, in turn with the contestants.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from step_case import Step, Task, serve, task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def flops(step: Step, t5: dict[str, Any], roberta: dict[str, Any]) -> dict[str, float]:
    """Return the floating-point operations of the leanest step by stage; a multiply-add is 2.

    `t5` and `roberta` are the contents of the models' config.json.
    """
    batch = step.batch
    prompt = step.prompt
    response = step.response
    read = batch * prompt
    written = batch * response

    width = t5["d_model"]
    hidden = t5["d_ff"]
    layers = t5["num_layers"]
    inner = t5["num_heads"] * t5["d_kv"]
    square = 2 * width * inner  # one projection of one token: q, k, v or o
    ffn = 2 * 3 * width * hidden  # gated: two up, one down
    # For every token of the prompt: q, k, v, o and feed-forward. Attention: two products (scores, weighted values) for
    # every pair of tokens.
    encode = layers * (read * (4 * square + ffn) + 2 * 2 * batch * prompt * prompt * inner)
    # Keys and values of the prompt for every decoder layer.
    cross = layers * read * 2 * square
    # For every token of the response: self-attention's q, k, v, o, cross-attention's q and o, and feed-forward.
    linear = layers * written * (4 * square + 2 * square + ffn)
    # Attention of every token of the response: to itself and the tokens before it (t at position t), and to the prompt.
    itself = layers * 2 * 2 * batch * inner * response * (response + 1) / 2
    across = layers * 2 * 2 * batch * inner * response * prompt
    head = written * 2 * width * t5["vocab_size"]
    forward = linear + itself + across + head
    # Only gradients of activations, because the weights are frozen: every linear layer once more, except q, k, v of the
    # lowest layer (nothing below its adapter trains). Self-attention: both factors of both products. Cross-attention:
    # not the gradient of the keys, which have no adapter.
    backward = linear - written * 3 * square + 2 * itself + 1.5 * across + head

    reward_width = roberta["hidden_size"]
    scored = response + 1  # with EOS
    per_token = 2 * (4 * reward_width**2 + 2 * reward_width * roberta["intermediate_size"])
    attention = 2 * 2 * batch * scored**2 * reward_width
    dense = batch * 2 * reward_width**2  # the classifier's hidden layer
    score = roberta["num_hidden_layers"] * (batch * scored * per_token + attention) + dense

    return {
        "encode": encode,
        "sample": cross + forward,
        "log-probs": forward,
        "score": score,
        "update": step.epochs * (forward + backward),
    }


def linear_layers() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Return the implementations of a linear layer by name: PyTorch's own, and oneDNN's if it is available."""
    linears: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"plain": torch.nn.functional.linear}
    if torch.backends.mkldnn.is_available():
        linears["oneDNN"] = lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return linears


@torch.inference_mode()
def rates(step: Step, t5: dict[str, Any], dtype: torch.dtype, seconds: float = 0.4) -> dict[str, float]:
    """Return the best rate (FLOP/s) of each implementation over the large products of a step, `seconds` for each.

    `feed-forward` is the rate of PyTorch's own linear layer on the shape that takes most of an encoder's time.
    """
    width, hidden = t5["d_model"], t5["d_ff"]
    read = step.batch * step.prompt
    feed_forward = (read, width, hidden)
    others = [
        (read, width, width),
        (read, hidden, width),
        (read, width, 2 * hidden),
        (step.tokens, width, t5["vocab_size"]),
    ]
    on_feed_forward = best_rates([feed_forward], dtype, seconds)
    best = best_rates(others, dtype, seconds)
    fastest = {name: max(rate, on_feed_forward[name]) for name, rate in best.items()}
    return fastest | {"feed-forward": on_feed_forward["plain"]}


def best_rates(shapes: list[tuple[int, int, int]], dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Return the best rate (FLOP/s) of each implementation over shapes (rows, in, out), `seconds` for each."""
    best: dict[str, float] = {}
    for rows, inside, outside in shapes:
        x = torch.randn(rows, inside).to(dtype)
        weight = torch.randn(outside, inside).to(dtype)
        operations = 2 * rows * inside * outside
        for name, linear in linear_layers().items():
            rate = operations / _shortest(partial(linear, x, weight), seconds)
            best[name] = max(best.get(name, 0.0), rate)
    return best


def _shortest(work: Callable[[], torch.Tensor], seconds: float) -> float:
    """Return the shortest duration of `work`, which is repeated for some seconds after one warm-up."""
    work()
    shortest = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def floor(work: dict[str, float], rate: float) -> dict[str, float]:
    """Return the seconds of each stage at a rate (FLOP/s)."""
    return {stage: flop / rate for stage, flop in work.items()}


def stepper(given: Task, seconds: float = 0.4) -> Callable[[int, Step], dict[str, Any]]:
    """Return a function that measures the rates and returns the floor."""
    torch.set_num_threads(given.threads)
    t5, roberta = (json.loads((Path(given.models) / name / "config.json").read_text()) for name in ("policy", "reward"))

    def run(i: int, step: Step) -> dict[str, Any]:
        work = flops(step, t5, roberta)
        measured = rates(step, t5, DTYPES[given.dtype], seconds)
        stages = floor(work, max(measured.values()))
        plain = floor(work, measured["feed-forward"])
        return {
            "seconds": sum(stages.values()),
            "plain_seconds": sum(plain.values()),
            "stages": stages,
            "gflop": sum(work.values()) / 1e9,
            **{f"{name} GFLOP/s": rate / 1e9 for name, rate in measured.items()},
        }

    return run


def main() -> None:
    requested = task(sys.argv[1:])
    serve(requested.step, stepper(requested))


if __name__ == "__main__":
    main()
