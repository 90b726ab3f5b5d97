"""What does a run folder hold, and how is it written and watched?"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from detoxrl.config.edit import config_from_json, config_to_json
from detoxrl.config.schema import Config
from detoxrl.errors import InputError, require
from detoxrl.runtime.console import log
from detoxrl.runtime.files import explain_corruption, is_temporary, remove_leftovers, remove_path, write_text

# What eval.json calls the reward's own model where it judges: no independent judge.
REWARD_JUDGE = "reward classifier"
NOTHING_BETTER = (
    "no policy was better than the start, so the start was kept: see validation.jsonl for what came of the others. "
    "More rows, more steps, another rl.lr or a larger rl.quality_margin may help."
)
STAGES = ("prepare", "sft", "train", "evaluate", "report")
# What each stage makes, but for the rows, which are made anew whenever prepare is. A folder shows that it was begun.
PRODUCTS = {
    "prepare": ("checkpoints/prepare", "reward", "tokenizer"),
    "sft": ("checkpoints/sft", "base", "start", "baseline", "expert"),
    "train": ("checkpoints/train", "adapter", "checkpoint.json", "normaliser.json", "memory.json",
              "metrics.jsonl", "validation.jsonl", "rollouts.jsonl"),
    "evaluate": ("responses.jsonl", "eval.json", "samples.jsonl", "masked_words.json"),
    "report": ("report.html", "samples.csv", "compared.csv", "blind_sheet.csv", "blind_key.csv"),
}  # fmt: skip
_AGAIN = "make it again: remove seconds.json, and --resume does what is missing"
_LOCK = ".lock"


def products_from(first: str) -> list[str]:
    """Return what a stage and those after it make."""
    return [name for stage in STAGES[STAGES.index(first) :] for name in PRODUCTS[stage]]


class RunFolder:
    """The interface between stages: each reads what those before it wrote, and writes atomically."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.on_append: Callable[[], None] = lambda: None  # called after each line that `append` wrote

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.root,)  # who is called after a line stays in this process

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @staticmethod
    def refuse_unfit(root: Path, overwrite: bool) -> None:
        """Raise InputError when `root` cannot become a new run folder. Nothing is written."""
        require(not root.is_file(), "--run-dir", str(root), "is a file", "name a folder")
        parent = next(parent for parent in (root, *root.absolute().parents) if parent.exists())
        writable = parent.is_dir() and os.access(parent, os.W_OK)
        require(writable, "--run-dir", str(root), f"cannot be made: {parent} is not writable", "name another folder")
        # A process that was killed before it had anything to keep leaves no more than these.
        if not root.exists() or all(path.name in (_LOCK, "run.json") or is_temporary(path) for path in root.iterdir()):
            return
        # Model folders hold a config.json too: only one that says `recipe` is ours to delete.
        ours = (root / "config.json").is_file() and '"recipe"' in (root / "config.json").read_text("utf-8")
        require(ours, "--run-dir", str(root), "is no run folder", "name another folder; nothing was deleted")
        remedy = "add --resume to go on, --overwrite to begin anew, or name another folder"
        require(overwrite, "--run-dir", str(root), "exists already", remedy)

    @contextmanager
    def locked(self) -> Iterator[Self]:
        """Make the folder if need be, keep others out, sweep it. Raises InputError if it is held or cannot be made."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self / _LOCK).acquire(timeout=0)
        except Timeout:
            remedy = "wait for it, stop it, or name another folder"
            raise InputError("run folder", str(self.root), "is in use by another process", remedy) from None
        except OSError as error:
            rule = f"cannot be {'written in' if self.root.is_dir() else 'made'}: {error.strerror}"
            raise InputError("--run-dir", str(self.root), rule, "name another folder") from error
        with lock:
            remove_leftovers(self.root)
            yield self

    def begin(self, config: Config, account: dict[str, Any], overwrite: bool) -> None:
        """Make the held folder that of a new run. Raises InputError when it holds one that may not be replaced."""
        self.refuse_unfit(self.root, overwrite)
        # The config goes last: until then this is the old run, which knows how to make anew what is gone.
        for path in sorted(self.root.iterdir(), key=lambda path: path.name != "seconds.json"):
            if path.name not in (_LOCK, "config.json", "run.json"):
                remove_path(path)
        self.write_json("run.json", account)
        self.write("config.json", config_to_json(config))

    @classmethod
    def open(cls, root: Path) -> tuple[Self, Config]:
        """Return an existing run folder and its config. Raises InputError when it holds none."""
        if not (root / "config.json").is_file():
            near = Path("runs") / root
            remedy = f"did you mean {near}?" if near.is_dir() else "run `detoxrl prepare RECIPE` first"
            raise InputError("run folder", str(root), "holds no config.json", remedy)
        return cls(root), config_from_json(root / "config.json")

    def need(self, name: str, stage: str) -> Path:
        """Return the path of a stage's product. Raises InputError when that stage has not run."""
        path = self.root / name
        remedy = _AGAIN if stage == "prepare" else f"run `detoxrl {stage} {self.root}` first"
        require(path.exists(), "run folder", str(self.root), f"has no {name}", remedy)
        return path

    def write(self, name: str, text: str) -> None:
        """Write a text file so that it is there whole or not at all."""
        write_text(self.root / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as indented JSON; NaN is refused."""
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Return the value stored in a JSON file of the folder. Raises StorageError when it is torn."""
        with explain_corruption(self / name, _AGAIN):
            return json.loads((self / name).read_text(encoding="utf-8"))

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one object to a JSON-lines file; numbers keep six significant digits."""
        rounded = {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in record.items()}
        with (self.root / name).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(rounded, ensure_ascii=False, allow_nan=False) + "\n")
        self.on_append()

    def read_lines(self, name: str) -> list[Any]:
        """Return the objects of a JSON-lines file, which is cut at the first line that is torn; no file holds none."""
        path, found = self.root / name, list[Any]()
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        try:
            for line in lines:
                found.append(json.loads(line))
        except ValueError:
            os.truncate(path, sum(map(len, lines[: len(found)])))
        return found

    def discard(self, names: Iterable[str]) -> None:
        """Delete products of an earlier run that what comes now would belie."""
        there = [name for name in names if (self.root / name).exists()]
        if there:
            log.print(f"{self.root}: removing {', '.join(there)}, which what comes now would belie")
        for name in there:
            remove_path(self.root / name)

    def finished(self) -> dict[str, float]:
        """Return the stages that are done, with the seconds each took."""
        return dict(self.read_json("seconds.json") if (self / "seconds.json").is_file() else {})

    def has_started(self, stage: str) -> bool:
        """Return whether a stage is finished or has something to go on from."""
        return stage in self.finished() or any((self / name).is_dir() for name in PRODUCTS[stage])

    def reopen(self, stage: str) -> dict[str, float]:
        """Count a stage and those after it as not done, and return the stages before it."""
        before = {name: s for name, s in self.finished().items() if STAGES.index(name) < STAGES.index(stage)}
        self.write_json("seconds.json", before)
        return before

    @contextmanager
    def timed(self, stage: str, started: float | None = None) -> Iterator[Callable[[], dict[str, float]]]:
        """Record the seconds of a stage in seconds.json once it is done; until then it and later ones are not.

        Yields a function that returns what will be recorded.
        """
        before = self.reopen(stage)
        started = started or time.perf_counter()

        def seconds() -> dict[str, float]:
            return before | {stage: round(time.perf_counter() - started, 2)}

        yield seconds
        self.write_json("seconds.json", seconds())
