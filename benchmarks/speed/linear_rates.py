"""Which product of a matrix is the fastest on this processor, by the number of rows?

    python benchmarks/speed/linear_rates.py

prints GFLOP/s of one thread, by processor time: PyTorch's own product in float32, oneDNN's, oneDNN's with a weight in
its own layout, PyTorch's in bfloat16, and the product in float32 with a weight that is stored in bfloat16.
`models/kernels.py` chooses among them by two of these shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear

from detoxrl.models.kernels import kernels, onednn_layout, onednn_linear
from detoxrl.runtime.allocator import keep_freed_memory

ROWS = (1, 4, 16, 64, 256, 1024)
SHAPES = ((1536, 576), (768, 2048), (2048, 768), (49_152, 576))
"""Out and in: layers of SmolLM2-135M and of FLAN-T5-base, and the head of the first."""
ROUNDS = 7
_MOST_OPERATIONS = 2 * 64 * 49_152 * 576  # Larger products tell nothing new.


def from_bf16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the product in float32 with a weight that is stored in bfloat16."""
    return linear(x, weight.float())


def products(rows: int, shape: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Return the products of a shape, by name."""
    x = torch.randn(rows, shape[1])
    weight = torch.randn(shape)
    in_bf16 = weight.bfloat16()
    return {
        "float32": partial(linear, x, weight),
        "oneDNN": partial(onednn_linear, x, weight),
        "packed": partial(onednn_linear, x, onednn_layout(weight, rows)),
        "bfloat16": partial(linear, x.bfloat16(), in_bf16),
        "stored in bfloat16": partial(from_bf16, x, in_bf16),
    }


def seconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the shortest processor time of each function; they take turns."""
    best = dict.fromkeys(functions, float("inf"))
    for round_number in range(ROUNDS + 1):
        for name, function in functions.items():
            started = time.thread_time()
            function()
            if round_number > 0:  # The first call of a kernel prepares it.
                best[name] = min(best[name], time.thread_time() - started)
    return best


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}: {kernels()}")
    names = list(products(1, SHAPES[0]))
    print(f"| rows | out x in | {' | '.join(names)} |")
    print(f"|--:|---|{'--:|' * len(names)}")
    with torch.inference_mode():
        for rows in ROWS:
            for shape in SHAPES:
                operations = 2 * rows * shape[0] * shape[1]
                if operations > _MOST_OPERATIONS:
                    continue
                taken = seconds(products(rows, shape))
                rates = " | ".join(f"{operations / taken[name] / 1e9:.0f}" for name in names)
                print(f"| {rows} | {shape[0]} x {shape[1]} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
