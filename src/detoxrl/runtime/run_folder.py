"""What is in a run folder, and how do the stages of a run read and write it?"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock, Timeout

from detoxrl.config.edit import config_from_json, config_to_json
from detoxrl.config.names import misspelt, question
from detoxrl.config.schema import Config
from detoxrl.errors import InputError, require
from detoxrl.runtime.console import log
from detoxrl.runtime.files import explain_corruption, is_temporary, remove_leftovers, remove_path, write_text
from detoxrl.runtime.run_files import require_contents

# The name in eval.json of the reward's own classifier when it is a judge too; it is not an independent judge.
REWARD_JUDGE = "reward classifier"
# The verdict in eval.json of a run whose training found no better policy. Nothing was compared then.
INITIAL_KEPT = "initial policy kept"
NORMALISER = "normaliser.json"
"""The file that holds mean and std of each term of the reward on responses of the initial policy."""
# What stands in for quality where rows have neither facts nor references. Reports show quality as not measured.
SHARE_WITH_TEXT = "share with text"
IfExists = Literal["error", "overwrite", "resume", "resume with changes"]
"""What to do with a run folder that exists: refuse it, replace it, or resume its run, with other settings too."""

STAGES = ("prepare", "sft", "train", "evaluate", "report")
# What each stage writes, except for the rows, which prepare writes anew each time. A checkpoint folder or a model says
# that the stage has started.
PRODUCTS = {
    "prepare": ("checkpoints/prepare", "reward", "tokenizer"),
    "sft": ("checkpoints/sft", "base", "start", "baseline", "expert", "dpo"),
    "train": ("checkpoints/train", "adapter", "checkpoint.json", NORMALISER, "memory.json",
              "metrics.jsonl", "validation.jsonl", "rollouts.jsonl"),
    "evaluate": ("responses.jsonl", "eval.json", "samples.jsonl", "masked_words.json"),
    "report": ("report.html", "samples.csv", "compared.csv", "blind_sheet.csv", "blind_key.csv"),
}  # fmt: skip
_LOCK = ".lock"
PARTS = "seconds_before_stop.json"
"""The seconds of a stage up to the signal that has stopped it; there is no such file once the stage is finished."""
_REBUILD = "remove seconds.json and run again with --resume, which rebuilds it"


def products_from(first: str) -> list[str]:
    """Return what a stage and all later stages write."""
    products: list[str] = []
    for stage in STAGES[STAGES.index(first) :]:
        products += PRODUCTS[stage]
    return products


class RunFolder:
    """The interface between stages: each reads what earlier stages wrote, and writes its own products atomically."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.on_append: Callable[[], None] = _ignore_line  # called after each line that `append` writes

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.root,)  # the listener stays in this process

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @staticmethod
    def require_usable(root: Path, overwrite: bool) -> None:
        """Raise InputError when `root` cannot become a new run folder. Writes nothing."""
        require(not root.is_file(), "--run-dir", str(root), "is a file", "name a folder")
        _require_writable(root)
        if _is_unused(root):
            return

        remedy = "name another folder; nothing was deleted"
        require(_is_run(root), "--run-dir", str(root), "is not a run folder", remedy)
        remedy = "add --resume to resume it, --overwrite to replace it, or name another folder"
        require(overwrite, "--run-dir", str(root), "already exists", remedy)

    @contextmanager
    def locked(self) -> Iterator[Self]:
        """Hold the folder for this process and delete what killed processes left half written; creates the folder.

        Raises InputError when another process holds it or when it cannot be created.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self / _LOCK).acquire(timeout=0)
        except Timeout:
            remedy = "wait for it, stop it, or name another folder"
            raise InputError("run folder", str(self.root), "is in use by another process", remedy) from None
        except OSError as error:
            what = "written to" if self.root.is_dir() else "created"
            rule = f"cannot be {what}: {error.strerror}"
            raise InputError("--run-dir", str(self.root), rule, "name another folder") from error

        with lock:
            remove_leftovers(self.root)
            yield self

    def begin(self, config: Config, account: dict[str, Any], overwrite: bool) -> None:
        """Turn the locked folder into a new run. Raises InputError when it has contents that may not be replaced."""
        self.require_usable(self.root, overwrite)
        # Written out first: what cannot be written must not cost the old run.
        texts = {"run.json": as_json(account), "config.json": config_to_json(config)}
        for text in texts.values():
            _require_encodable(text)

        self._delete_old_run()
        for name, text in texts.items():
            self.write(name, text)

    def _delete_old_run(self) -> None:
        # After a kill in here the folder is still the old run: seconds.json goes first, so that no stage counts as
        # finished, and config.json stays until the new one replaces it, so that --resume can rebuild what is gone.
        remove_path(self / "seconds.json")
        for path in sorted(self.root.iterdir()):
            if path.name not in (_LOCK, "config.json", "run.json"):
                remove_path(path)

    @classmethod
    def open(cls, root: Path) -> tuple[Self, Config]:
        """Return an existing run folder and its config. Raises InputError when there is none."""
        if not (root / "config.json").is_file():
            rule = "holds no config.json" if root.exists() else "does not exist"
            raise InputError("run folder", str(root), rule, _likely_run(root))
        folder = cls(root)
        folder._require_todays_rows()
        return folder, config_from_json(root / "config.json")

    def _require_todays_rows(self) -> None:
        """Raise InputError when an earlier version has written the rows, which knew dialogues alone."""
        if not (self / "rows.json").is_file():
            return
        rule = "was made by an earlier version, whose rows this one cannot read"
        remedy = f"repeat it: detoxrl run --from {self / 'config.json'} --run-dir NEW"
        require("task" in self.read_json("rows.json"), "run folder", str(self.root), rule, remedy)

    def require_product(self, name: str, stage: str) -> Path:
        """Return the path of a stage's product. Raises InputError when it does not exist."""
        path = self / name
        remedy = _REBUILD if stage == "prepare" else f"run `detoxrl {stage} {self.root}` first"
        require(path.exists(), "run folder", str(self.root), f"has no {name}", remedy)
        return path

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_text(self / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as indented JSON, atomically. Raises ValueError for NaN."""
        self.write(name, as_json(value))

    def read_json(self, name: str) -> Any:
        """Return the value in a JSON file. Raises StorageError if it is missing or lacks what it has to hold."""
        path = self / name
        with explain_corruption(path, _remedy(name)):
            value = json.loads(path.read_text(encoding="utf-8"))
            require_contents(name, value)
            return value

    def kept_initial_policy(self) -> bool:
        """Return whether training ended without a better policy than the initial one; False if nothing was trained."""
        trained = (self / "checkpoint.json").is_file()
        return trained and self.read_json("checkpoint.json")["kept_step"] == 0

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one object to a JSON-lines file; floats keep six significant digits. Raises ValueError for NaN."""
        rounded = {}
        for key, value in record.items():
            rounded[key] = float(f"{value:.6g}") if isinstance(value, float) else value
        line = json.dumps(rounded, ensure_ascii=False, allow_nan=False) + "\n"

        with (self / name).open("a", encoding="utf-8") as file:
            file.write(line)
        self.on_append()

    def read_lines(self, name: str) -> list[Any]:
        """Return the objects in a JSON-lines file, up to the first corrupted line; the file is truncated there.

        A missing file has no lines.
        """
        path = self / name
        if not path.is_file():
            return []

        records = []
        intact_bytes = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                records.append(json.loads(line))
            except ValueError:
                os.truncate(path, intact_bytes)
                break
            intact_bytes += len(line)
        return records

    def discard(self, names: Iterable[str]) -> None:
        """Delete products of an earlier run that do not belong to the one that comes now."""
        existing = [name for name in names if (self / name).exists()]
        if not existing:
            return

        subject = "it is" if len(existing) == 1 else "they are"
        log.print(f"{self.root}: removing {', '.join(existing)}: {subject} left over from an earlier run")
        for name in existing:
            remove_path(self / name)

    def finished(self) -> dict[str, float]:
        """Return the seconds that each finished stage took."""
        if not (self / "seconds.json").is_file():
            return {}
        return dict(self.read_json("seconds.json"))

    def has_started(self, stage: str) -> bool:
        """Return whether a stage is finished or has written something that it can resume from."""
        return stage in self.finished() or any((self / name).is_dir() for name in PRODUCTS[stage])

    def reopen(self, stage: str) -> dict[str, float]:
        """Mark a stage and all later ones as not finished; return the seconds of the earlier ones."""
        earlier_stages = STAGES[: STAGES.index(stage)]
        seconds = {name: taken for name, taken in self.finished().items() if name in earlier_stages}
        self.write_json("seconds.json", seconds)
        return seconds

    @contextmanager
    def timed(self, stage: str, started: float | None = None) -> Iterator[Callable[[], dict[str, float]]]:
        """Mark a stage as not finished, and record its seconds in seconds.json when the block ends.

        `started` is an earlier `time.perf_counter()` to count from. Those of an earlier part of the stage, which a
        signal has stopped, count too. Yields a function that returns what would be recorded now.
        """
        earlier = self.reopen(stage)
        before = self._seconds_of_parts().get(stage, 0.0)
        if started is None:
            started = time.perf_counter()

        def seconds() -> dict[str, float]:
            return {**earlier, stage: round(before + time.perf_counter() - started, 2)}

        try:
            yield seconds
        except KeyboardInterrupt:
            self.write_json(PARTS, {stage: seconds()[stage]})
            raise
        self.write_json("seconds.json", seconds())
        self.forget_parts()

    def _seconds_of_parts(self) -> dict[str, float]:
        return dict(self.read_json(PARTS)) if (self / PARTS).is_file() else {}

    def forget_parts(self) -> None:
        """Let the stage that comes now begin at 0 seconds."""
        remove_path(self / PARTS)


def as_json(value: Any) -> str:
    """Return `value` as indented JSON. Raises ValueError for NaN."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _require_encodable(text: str) -> None:
    """Raise InputError for text that UTF-8 cannot hold: half a pair of surrogates, as of a file name in other bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - 20) : error.end].splitlines()[-1]
        rule = "holds a character that no file can be written with"
        raise InputError("settings", ascii(part), rule, "rename the file, or change the setting") from None


def _remedy(name: str) -> str:
    """Return what makes a file of a run again."""
    if name in ("eval.json", "masked_words.json"):
        return "run `detoxrl evaluate` on the run again, which writes it"
    if name in ("run.json", "checkpoint.json", "memory.json"):
        return "put the file back, or start over with --overwrite"
    return _REBUILD


def _ignore_line() -> None:
    pass


def _require_writable(root: Path) -> None:
    existing = root.absolute()
    while not existing.exists():
        existing = existing.parent

    writable = existing.is_dir() and os.access(existing, os.W_OK)
    require(writable, "--run-dir", str(root), f"cannot be created: {existing} is not writable", "name another folder")


def _is_unused(root: Path) -> bool:
    """Return whether a run killed right after it started could have left `root` like this; then nothing is lost."""
    if not root.exists():
        return True
    return all(path.name in (_LOCK, "run.json") or is_temporary(path) for path in root.iterdir())


def _likely_run(root: Path) -> str:
    """Return the remedy for a folder that is no run: the run that was meant, or the runs that there are beside it."""
    below = Path("runs") / root
    if below.is_dir():
        return f"did you mean {below}?"

    names = sorted(path.parent.name for path in root.parent.glob("*/config.json") if _is_run(path.parent))
    there_is = f"{root.parent} contains {', '.join(names)}" if names else "run `detoxrl prepare RECIPE` first"
    return question([str(root.parent / name) for name in misspelt(root.name, names)]) or there_is


def _is_run(root: Path) -> bool:
    """Return whether a folder holds a run, by its config: those of models and of other things lack its sections."""
    try:
        config = json.loads((root / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and all(isinstance(config.get(name), dict) for name in ("data", "policy", "rl"))
