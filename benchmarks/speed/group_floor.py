"""How fast could a step on a causal model be if it did only its large matrix products, at the best measured rate?

The leanest step reads each prompt once for its group in sampling, under the reference and in the update, records
log-probs while sampling, and computes logits of responses alone. As in step_floor.py, what is not counted makes the
floor too low rather than too high. A worker that group_speed.py starts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from group_case import GroupTask, group_task
from step_case import Step, serve
from step_floor import best_rates, floor


def flops(step: Step, group_size: int, llama: dict[str, Any]) -> dict[str, float]:
    """Return the floating-point operations of the leanest step by stage; a multiply-add is 2.

    `llama` is the content of the model's config.json.
    """
    read = step.batch // group_size * step.prompt
    written = step.tokens
    width = llama["hidden_size"]
    layers = llama["num_hidden_layers"]
    head_width = llama.get("head_dim") or width // llama["num_attention_heads"]
    inner = llama["num_attention_heads"] * head_width
    shared = llama["num_key_value_heads"] * head_width

    queries_keys_values = 2 * width * (inner + 2 * shared)
    token = queries_keys_values + 2 * inner * width + 2 * 3 * width * llama["intermediate_size"]
    linear = layers * (read + written) * token
    # Two products for every pair of a token and one that it sees: in the prompt, from a response to it, in a response.
    pairs = read * (step.prompt + 1) / 2 + written * step.prompt + written * (step.response + 1) / 2
    attention = layers * 2 * 2 * pairs * inner
    head = written * 2 * width * llama["vocab_size"]

    forward = linear + attention + head
    # Only gradients of activations, because the weights are frozen, and none below the lowest layer's queries, keys and
    # values. Attention has both factors of both products.
    backward = linear - (read + written) * queries_keys_values + 2 * attention + head
    return {"rollout": 2 * forward, "update": step.epochs * (forward + backward)}


def stepper(given: GroupTask, seconds: float = 0.4) -> Callable[[int, Step], dict[str, Any]]:
    """Return a function that measures the rates and returns the floor."""
    torch.set_num_threads(given.threads)
    llama = json.loads((Path(given.models) / "config.json").read_text(encoding="utf-8"))

    def run(number: int, step: Step) -> dict[str, Any]:
        work = flops(step, given.group_size, llama)
        rows = step.batch // given.group_size * step.prompt + step.tokens
        width, hidden = llama["hidden_size"], llama["intermediate_size"]
        shapes = [(rows, width, width), (rows, width, hidden), (rows, hidden, width)]
        shapes.append((step.tokens, width, llama["vocab_size"]))
        with torch.inference_mode():
            rates = best_rates(shapes, torch.float32, seconds)

        stages = floor(work, max(rates.values()))
        in_gflop = {f"{name} GFLOP/s": rate / 1e9 for name, rate in rates.items()}
        return {"seconds": sum(stages.values()), "stages": stages, "gflop": sum(work.values()) / 1e9, **in_gflop}

    return run


def main() -> None:
    given = group_task(sys.argv[1:])
    serve(given.step, stepper(given))


if __name__ == "__main__":
    main()
