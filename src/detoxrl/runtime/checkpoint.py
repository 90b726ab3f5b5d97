"""From which state does a training loop resume after it was stopped?"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from detoxrl.errors import StorageError, first_line
from detoxrl.runtime.console import log
from detoxrl.runtime.files import copy_path, file_digests, remove_path, replace_folder
from detoxrl.runtime.signals import stop_signals

SHARE = 0.02
"""Maximum fraction of a loop's time spent on writing checkpoints.

A kill therefore costs at most 1 / SHARE times the seconds that one checkpoint takes.
"""
_CHECKPOINTS_KEPT = 2  # the newest, and the one before it in case the newest is corrupted


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the weights that require a gradient by name; a weight with several names has one entry."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _never_stopped() -> None:
    return None


class Checkpoints:
    """Writes and restores the state of a training loop. Each checkpoint is a folder `step-N` with checksums.

    A checkpoint holds all that step N depends on: `weights` (by name), the optimizer's moments, and copies of
    `products`, the files and folders that the loop writes elsewhere (its logs among them). `restore` puts all of them
    back in place.
    """

    def __init__(
        self, folder: Path, weights: Mapping[str, torch.nn.Parameter], optimizer: Any, products: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self.weights = weights
        self.optimizer = optimizer
        self.products = products
        self._stop_requested: Callable[[], type[KeyboardInterrupt] | None] = _never_stopped
        self._written_at = 0.0  # on the monotonic clock, seconds
        self._min_interval = 0.0  # seconds between the end of one write and the next

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM inside the block wait for the next `point`."""
        with stop_signals(log.print) as stop_requested:
            self._stop_requested = stop_requested
            yield

    def restore(self) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint; return the state that `point` was given and the number of its "step".

        A corrupted checkpoint is reported and deleted, and the one before it is restored. Without any checkpoint the
        products of an earlier attempt are deleted, and the result is None. Raises StorageError when there are
        checkpoints and all are corrupted; then nothing is deleted.
        """
        checkpoints = self._existing()
        faults: dict[Path, str] = {}
        intact = None
        for checkpoint in reversed(checkpoints):
            fault = _fault(checkpoint)
            if fault is None:
                intact = checkpoint
                break
            faults[checkpoint] = fault
            log.print(f"{checkpoint} is corrupted: {fault}")

        if checkpoints and intact is None:
            newest = checkpoints[-1]
            remedy = f"restore that file, or remove {self.folder} to repeat this training from its first step"
            raise StorageError(f"{newest} is corrupted ({faults[newest]}); {remedy}")

        for path in (*faults, *self.products):
            remove_path(path)
        return None if intact is None else self._restore_from(intact)

    def point(self, step: int, state: Mapping[str, Any], now: bool = False) -> None:
        """Write the state before step `step` if `now`, if one is due, or if a stop was requested; then raise the stop.

        The checkpoint of a step is never written a second time: replacing the only one there is would leave none for a
        moment.
        """
        stop = self._stop_requested()
        started = time.monotonic()
        due = started - self._written_at >= self._min_interval

        if (now or stop or due) and not self._path(step).is_dir():
            self._write(step, state)
            self._written_at = time.monotonic()
            self._min_interval = (self._written_at - started) / SHARE

        if stop:
            raise stop

    def forget(self, keep: int = 0) -> None:
        """Delete all checkpoints but the newest `keep`."""
        newest_first = self._existing()[::-1]
        for checkpoint in newest_first[keep:]:
            remove_path(checkpoint)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _existing(self) -> list[Path]:
        return sorted(self.folder.glob(f"step-{'[0-9]' * 8}"))

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        moments = {}
        for number, tensors in self.optimizer.state_dict()["state"].items():
            for name, tensor in tensors.items():
                moments[f"{number}/{name}"] = tensor.contiguous()
        weights = {name: weight.detach().contiguous() for name, weight in self.weights.items()}

        with replace_folder(self._path(step)) as folder:
            save_file(weights, folder / "weights.safetensors")
            save_file(moments, folder / "moments.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            for product in self.products:
                copy_path(product, folder / "products" / product.name)
            # The manifest comes last: it covers the other files.
            (folder / "manifest.json").write_text(json.dumps(file_digests(folder), indent=2), encoding="utf-8")

        self.forget(keep=_CHECKPOINTS_KEPT)

    def _restore_from(self, checkpoint: Path) -> dict[str, Any]:
        stored = load_file(checkpoint / "weights.safetensors")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(stored[name])

        moments: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, tensor in load_file(checkpoint / "moments.safetensors").items():
            number, _, name = key.partition("/")
            moments[int(number)][name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})

        for product in self.products:
            copy_path(checkpoint / "products" / product.name, product)
        return dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def _fault(checkpoint: Path) -> str | None:
    """Return how the files of a checkpoint differ from its manifest; None when it is intact."""
    try:
        expected = dict(json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        return f"manifest.json: {first_line(error)}"

    actual = file_digests(checkpoint)
    del actual["manifest.json"]
    for name in sorted({*expected, *actual}):
        if expected.get(name) != actual.get(name):
            return f"{name} does not match manifest.json"
    return None
