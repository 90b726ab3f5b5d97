"""What does a run folder hold, and how is it written and watched?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from safetensors import SafetensorError

from detoxrl.config import Config
from detoxrl.errors import InputError, StorageError, first_line, require
from detoxrl.settings import config_from_json, config_to_json

# What eval.json calls the reward's own model where it judges: no independent judge.
REWARD_JUDGE = "reward classifier"
NOTHING_BETTER = (
    "no policy was better than the start, so the start was kept: see validation.jsonl for what came of the others. "
    "More rows, more steps, another rl.lr or a larger rl.quality_margin may help."
)
STAGES = ("prepare", "sft", "train", "evaluate", "report")
log = Console(stderr=True, highlight=False)


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` once it is complete; on an error it is removed."""
    temporary, old = (target.with_name(f".{target.name}.{kind}{os.getpid()}") for kind in ("new", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a torn or missing file into a StorageError."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        remedy = "remove it to begin its stage anew, the rest is kept"
        raise StorageError(f"{path} is broken: {reason}; {remedy}") from error


class RunFolder:
    """The interface between stages: each reads what those before it wrote, and writes atomically."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @staticmethod
    def refuse_unfit(root: Path, overwrite: bool) -> None:
        """Raise InputError when `root` cannot become a new run folder. Nothing is written."""
        require(not root.is_file(), "--run-dir", str(root), "is a file", "name a folder")
        parent = next(parent for parent in (root, *root.absolute().parents) if parent.exists())
        writable = parent.is_dir() and os.access(parent, os.W_OK)
        require(writable, "--run-dir", str(root), f"cannot be made: {parent} is not writable", "name another folder")
        if not root.exists() or not any(root.iterdir()):
            return
        remedy = "add --resume to go on, --overwrite to begin anew, or name another folder"
        require(overwrite, "--run-dir", str(root), "exists already", remedy)
        # Model folders hold a config.json too: only one that says `recipe` is ours to delete.
        ours = (root / "config.json").is_file() and '"recipe"' in (root / "config.json").read_text("utf-8")
        require(ours, "--run-dir", str(root), "is no run folder", "name another folder; nothing was deleted")

    @classmethod
    def create(cls, root: Path, config: Config, overwrite: bool) -> RunFolder:
        """Make the folder and store the config. Raises InputError when it exists and may not be replaced."""
        cls.refuse_unfit(root, overwrite)
        if root.exists():
            shutil.rmtree(root)
        folder = cls(root)
        try:
            folder.write("config.json", config_to_json(config))
        except OSError as error:
            remedy = "name another folder"
            raise InputError("--run-dir", str(root), f"cannot be made: {error.strerror}", remedy) from error
        return folder

    @classmethod
    def open(cls, root: Path) -> tuple[RunFolder, Config]:
        """Return an existing run folder and its config. Raises InputError when it holds none."""
        if not (root / "config.json").is_file():
            near = Path("runs") / root
            remedy = f"did you mean {near}?" if near.is_dir() else "run `detoxrl prepare RECIPE` first"
            raise InputError("run folder", str(root), "holds no config.json", remedy)
        return cls(root), config_from_json(root / "config.json")

    def need(self, name: str, stage: str) -> Path:
        """Return the path of a stage's product. Raises InputError when that stage has not run."""
        path = self.root / name
        if not path.exists():
            raise InputError("run folder", str(self.root), f"has no {name}", f"run `detoxrl {stage} {self.root}` first")
        return path

    def write(self, name: str, text: str) -> None:
        """Write a text file so that it is there whole or not at all."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as indented JSON; NaN is refused."""
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Return the value stored in a JSON file of the folder."""
        return json.loads((self.root / name).read_text(encoding="utf-8"))

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one object to a JSON-lines file; numbers keep six significant digits."""
        rounded = {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in record.items()}
        with (self.root / name).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(rounded, ensure_ascii=False, allow_nan=False) + "\n")

    def keep_before(self, name: str, step: int) -> None:
        """Cut a JSON-lines file to its records of the steps before `step`."""
        there = (self.root / name).is_file()  # a run that stopped in its first step has written none
        lines = (self.root / name).read_text(encoding="utf-8").split("\n") if there else []
        self.write(name, "".join(f"{line}\n" for line in lines if line and json.loads(line)["step"] < step))

    def discard(self, *names: str) -> None:
        """Delete products of an earlier run that what comes now would belie."""
        there = [name for name in names if (self.root / name).exists()]
        if there:
            log.print(f"{self.root}: removing {', '.join(there)}, which what comes now would belie")
        for name in there:
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finished(self) -> dict[str, float]:
        """Return the stages that are done, with the seconds each took."""
        if not (self / "seconds.json").is_file():
            return {}
        with reading(self / "seconds.json"):
            done: dict[str, float] = self.read_json("seconds.json")
        return done

    @contextmanager
    def timed(self, stage: str, started: float | None = None) -> Iterator[None]:
        """Record the seconds of a stage in seconds.json once it is done; until then it and later ones are not."""
        before = {name: s for name, s in self.finished().items() if STAGES.index(name) < STAGES.index(stage)}
        self.write_json("seconds.json", before)
        started = started or time.perf_counter()
        yield
        self.write_json("seconds.json", before | {stage: round(time.perf_counter() - started, 2)})


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr with rate and time left, `done` units of it full; yields `advance(status, units=1)`."""
    columns = [TextColumn("{task.description:<16}"), BarColumn(24), MofNCompleteColumn(), _Rate()]
    columns += [TimeRemainingColumn(compact=True), TextColumn("{task.fields[status]}", style="dim")]
    with Progress(*columns, console=log) as bar:
        task = bar.add_task(what, total=total, completed=done, status="")
        yield lambda status, units=1: bar.update(task, advance=units, status=status)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; the second one interrupts at once."""
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        log.print("interrupted: ending this step and writing its state (again: stop at once, without)")

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield lambda: False
        return
    earlier = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, earlier)
