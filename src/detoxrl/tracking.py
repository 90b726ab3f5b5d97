"""What does a run folder hold, and how is it written and watched?"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from detoxrl.config import Config, config_from_json, config_to_json
from detoxrl.errors import InputError, require

# What eval.json calls the reward's own model where it judges: no independent judge.
REWARD_JUDGE = "reward classifier"
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class RunFolder:
    """The interface between stages: each reads what those before it wrote, and writes atomically."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @classmethod
    def create(cls, root: Path, config: Config, overwrite: bool) -> RunFolder:
        """Make the folder and store the config. Raises InputError when it exists and may not be replaced."""
        require(not root.is_file(), "--run-dir", str(root), "is a file", "name a folder")
        if root.exists() and any(root.iterdir()):
            if not overwrite:
                raise InputError("--run-dir", str(root), "exists already", "add --overwrite or name another folder")
            # Model folders hold a config.json too: only one that says `recipe` is ours to delete.
            ours = (root / "config.json").is_file() and '"recipe"' in (root / "config.json").read_text("utf-8")
            remedy = "name another folder; nothing was deleted"
            require(ours, "--run-dir", str(root), "is no run folder", remedy)
            shutil.rmtree(root)
        folder = cls(root)
        folder.write("config.json", config_to_json(config))
        return folder

    @classmethod
    def open(cls, root: Path) -> tuple[RunFolder, Config]:
        """Return an existing run folder and its config. Raises InputError when it holds none."""
        if not (root / "config.json").is_file():
            raise InputError("run folder", str(root), "holds no config.json", "run `detoxrl prepare RECIPE` first")
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
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

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

    def discard(self, *names: str) -> None:
        """Delete products of an earlier run that what comes now would belie."""
        for name in names:
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the seconds a stage took in seconds.json."""
        started = time.perf_counter()
        yield
        known = self.read_json("seconds.json") if (self / "seconds.json").is_file() else {}
        self.write_json("seconds.json", known | {stage: round(time.perf_counter() - started, 2)})


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr with rate and time left; yields `advance(status, units=1)`."""
    columns = [TextColumn("{task.description:<16}"), BarColumn(24), MofNCompleteColumn(), _Rate()]
    columns += [TimeRemainingColumn(compact=True), TextColumn("{task.fields[status]}", style="dim")]
    with Progress(*columns, console=log) as bar:
        task = bar.add_task(what, total=total, status="")
        yield lambda status, units=1: bar.update(task, advance=units, status=status)
