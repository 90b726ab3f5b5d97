"""Which kernels multiply matrices fastest on this machine's CPU?

PyTorch has kernels of its own, and calls those of oneDNN through private operators. Which of them are faster depends on
the processor and on the number of rows, so they are timed: once on a machine, as the last digits of a run depend on
them. The answer stays in the cache of detoxrl, and a run that is resumed uses what it has begun with.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch.nn.functional import linear as torch_linear

from detoxrl.errors import InputError
from detoxrl.runtime.cache import cache_dir
from detoxrl.runtime.files import write_text

FEW_ROWS = 64
"""Up to so many rows, a product spends its time on reading the weight."""
_FILE = "kernels.json"
# Many rows meet a feed-forward layer of FLAN-T5-base. Few rows meet a weight that no cache holds, as in sampling, where
# a token reads them all.
_IN = 768
_OUT = 2048
_OUT_BEYOND_CACHES = 16384
_MANY_ROWS = 512
_ROUNDS = 5
# A private operator has to be faster by this factor.
_GAIN = 1.05


@dataclass(frozen=True)
class Kernels:
    """What is faster on a CPU than PyTorch's own kernels in float32."""

    onednn: bool  # oneDNN's product of many rows.
    packed: bool  # oneDNN's product of few rows with a weight in its own layout.
    bf16: bool  # A product in bfloat16.


PUBLIC = Kernels(onednn=False, packed=False, bf16=False)
"""PyTorch's own kernels, in float32."""

_in_use: Kernels | None = None


def kernels() -> Kernels:
    """Return the kernels that this process uses: the fastest of this machine, unless `use_kernels` chose others."""
    global _in_use
    if _in_use is None:
        _in_use = _remembered()
    return _in_use


def use_kernels(chosen: Kernels) -> None:
    """Let this process use other kernels from now on."""
    global _in_use
    _in_use = chosen


@contextmanager
def using_kernels(chosen: Kernels) -> Iterator[None]:
    """Use other kernels inside the block."""
    before = kernels()
    use_kernels(chosen)
    try:
        yield
    finally:
        use_kernels(before)


def _remembered() -> Kernels:
    """Return the fastest kernels of this machine, which are timed if the cache does not know them."""
    try:
        path = cache_dir() / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            known = _read(path)
            if _machine() not in known:
                known[_machine()] = asdict(measured_kernels())
                write_text(path, json.dumps(known, indent=2) + "\n")
            return Kernels(**known[_machine()])
    except (OSError, InputError):  # No cache can be written here, so the next process times them again.
        return measured_kernels()


def _read(path: Path) -> dict[str, dict[str, bool]]:
    """Return the kernels of each machine in a file, none if it is damaged."""
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {str(machine): asdict(Kernels(**of_machine)) for machine, of_machine in known.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _machine() -> str:
    """Return what the speed of kernels depends on."""
    abilities = sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "no limit")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {limit}: {' '.join(abilities)}"


def measured_kernels() -> Kernels:
    """Return the fastest kernels, timed now. It takes about a second.

    One thread is timed, by the processor time that it takes: so other load on the machine does not decide.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return _measured_on_one_thread()
    finally:
        torch.set_num_threads(threads)


def _measured_on_one_thread() -> Kernels:
    weight = torch.ones(_OUT, _IN)
    large_weight = torch.ones(_OUT_BEYOND_CACHES, _IN)
    many = torch.ones(_MANY_ROWS, _IN)
    few = many[: FEW_ROWS // 4]

    onednn = packed = False
    if torch.backends.mkldnn.is_available():
        onednn = _is_faster(lambda: onednn_linear(many, weight), lambda: torch_linear(many, weight), _GAIN)
        own_layout = onednn_layout(large_weight, len(few))
        packed = _is_faster(lambda: onednn_linear(few, own_layout), lambda: torch_linear(few, large_weight), _GAIN)

    in_bf16 = (few.bfloat16(), weight.bfloat16())
    bf16 = _is_faster(lambda: torch_linear(*in_bf16), lambda: torch_linear(few, weight), 1.0)
    return Kernels(onednn, packed, bf16)


def _is_faster(kernel: Callable[[], object], public: Callable[[], object], gain: float) -> bool:
    """Return whether a kernel's best time, times `gain`, is below that of another; both take turns."""
    best = [float("inf"), float("inf")]
    for round_number in range(_ROUNDS + 1):
        for number, function in enumerate((kernel, public)):
            started = time.thread_time()
            function()
            if round_number > 0:  # The first call of a kernel prepares it.
                best[number] = min(best[number], time.thread_time() - started)
    return best[0] * gain < best[1]


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + b for x (..., in), a weight (out, in) in either layout and a bias (out,), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def onednn_layout(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a copy of a weight (out, in) in the layout that oneDNN likes best for products with `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # type: ignore[no-any-return]
