"""From what can a loop go on after it was stopped?"""

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
"""Most of a loop's time that checkpoints may take; so what a kill costs is at most 1 / SHARE times one checkpoint."""
_KEPT = 2  # the newest, and the one before for the case that the newest is torn


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the weights that training may change, by name; a shared one is there once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


class Checkpoints:
    """The last two states of a loop, each a folder `step-N` with checksums: all that step N depends on.

    `weights` (by name) and the optimizer are put back in place. `products`, the files and folders that the loop writes
    elsewhere, its logs among them, are copied into each state and come back as they were.
    """

    def __init__(
        self, folder: Path, weights: Mapping[str, torch.nn.Parameter], optimizer: Any, products: Sequence[Path] = ()
    ) -> None:
        self.folder, self.weights, self.optimizer, self.products = folder, weights, optimizer, products
        self._stop: Callable[[], type[KeyboardInterrupt] | None] = lambda: None
        self._ended = self._wait = 0.0

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM inside the block wait for the next `point`."""
        with stop_signals(log.print) as self._stop:
            yield

    def restore(self) -> dict[str, Any] | None:
        """Put the newest whole state back and return what `point` was given with it, and its "step".

        A torn or edited one is named, and the one before is taken. None: there is none, and products of an earlier
        attempt are gone. Raises StorageError when there are some and none is whole; nothing is lost then.
        """
        places, broken = self._places(), dict[Path, str]()
        for place in reversed(places):
            fault = self._fault(place)
            if fault is None:
                break
            broken[place] = fault
            log.print(f"{place} is not as it was written: {fault}")
        if places and len(broken) == len(places):
            remedy = f"put that back, or remove {self.folder} to begin this loop anew"
            raise StorageError(f"{places[-1]} is not as it was written ({broken[places[-1]]}); {remedy}")
        for path in (*broken, *self.products):
            remove_path(path)
        return self._put_back(place) if places else None

    def point(self, step: int, state: Mapping[str, Any], now: bool = False) -> None:
        """Write the state before step `step` when `now`, when one is due or when a stop was asked for; then stop.

        A step has one state, which is never written a second time: the only one there is would be away for a moment.
        """
        stop, started = self._stop(), time.monotonic()
        if (now or stop or started - self._ended >= self._wait) and not self._place(step).is_dir():
            self._write(step, state)
            self._ended = time.monotonic()
            self._wait = (self._ended - started) / SHARE
        if stop:
            raise stop

    def forget(self, keep: int = 0) -> None:
        """Delete all but the newest `keep`."""
        for place in self._places()[::-1][keep:]:
            remove_path(place)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _places(self) -> list[Path]:
        return sorted(self.folder.glob(f"step-{'[0-9]' * 8}"))

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        moments = {
            f"{number}/{name}": tensor.contiguous()
            for number, of_one in self.optimizer.state_dict()["state"].items()
            for name, tensor in of_one.items()
        }
        weights = {name: weight.detach().contiguous() for name, weight in self.weights.items()}
        with replace_folder(self._place(step)) as place:
            save_file(weights, place / "weights.safetensors")
            save_file(moments, place / "moments.safetensors")
            (place / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            for product in self.products:
                copy_path(product, place / "products" / product.name)
            (place / "manifest.json").write_text(json.dumps(file_digests(place), indent=2), encoding="utf-8")
        self.forget(keep=_KEPT)

    def _fault(self, place: Path) -> str | None:
        try:
            files = dict(json.loads((place / "manifest.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            return f"manifest.json: {first_line(error)}"
        found = file_digests(place)
        del found["manifest.json"]
        wrong = [name for name in sorted({*files, *found}) if files.get(name) != found.get(name)]
        return f"{wrong[0]} differs" if wrong else None

    def _put_back(self, place: Path) -> dict[str, Any]:
        stored = load_file(place / "weights.safetensors")
        moments: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, tensor in load_file(place / "moments.safetensors").items():
            number, _, name = key.partition("/")
            moments[int(number)][name] = tensor
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(stored[name])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
        for product in self.products:
            copy_path(place / "products" / product.name, product)
        return dict(json.loads((place / "state.json").read_text(encoding="utf-8")))
