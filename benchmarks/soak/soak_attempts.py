"""What does one attempt of the soak test do until it ends or is killed, and did it leave what it should?

It calls the command line as the shell does, counts what that does to files, and can end itself at any such operation:
as kill -9 does, or as a power cut does, which also takes what was written but not yet brought to the disk.

    python benchmarks/soak_attempts.py run quickstart ...     the same command in a process of its own, with the small
                                                              reward model of the soak test
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As many threads everywhere, no GPU, no network. Each has to be said before torch is imported.
os.environ |= {
    "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "2000", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1", "COLUMNS": "120",
}  # fmt: skip

import peft  # noqa: F401
import profanity_check  # noqa: F401
import psutil
import torch
import transformers  # noqa: F401
from tokenizers import processors

from detoxrl import cli
from detoxrl.commands import prepare
from detoxrl.commands import run as stages
from detoxrl.data.embedded.corpus import generate_rows
from detoxrl.models.loading import save_base, scratch_tokenizer
from detoxrl.runtime import checkpoint
from detoxrl.runtime.files import is_temporary
from detoxrl.runtime.run_folder import STAGES, RunFolder

LOGS = ("metrics.jsonl", "validation.jsonl", "rollouts.jsonl")
TESTS = Path(__file__).resolve().parents[2] / "tests"
REWARD = "def brevity(prompts, responses):\n    return [-len(text) / 10 for text in responses]\n"
# Which argument of an audit event is the path that it changes, and which the folder that the path starts from.
_CHANGES = {
    "os.rename": (1, 3), "os.remove": (0, 1), "os.mkdir": (0, 2), "os.rmdir": (0, 1), "os.truncate": (0, None),
    "shutil.copytree": (1, None), "shutil.copyfile": (1, None), "shutil.rmtree": (0, None),
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# The attempt


@dataclass(frozen=True, kw_only=True)
class End:
    """The file operation before which an attempt ends itself."""

    stage: str
    number: int
    """It counts from 1 within the stage."""
    power: bool
    """What is not on the disk goes too."""
    seed: int
    """Decides how much of that goes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One attempt."""

    words: Sequence[str]
    place: Path
    """Where it runs; all that it writes lies in here."""
    shown: Path
    """Folder for what it prints: stdout, stderr, and the numbers of file operations in counts.json."""
    eager: bool
    """Write a checkpoint at each step, not only at 2 % of the time."""
    stage: str
    """The first one that is not finished."""
    end: End | None = None


class Spy:
    """Counts the file operations of each stage in this process, and ends it at the one that was drawn."""

    def __init__(self, plan: Plan) -> None:
        self.place, self.end, self.stage = plan.place, plan.end, plan.stage
        self.counts: Counter[str] = Counter()
        self.ending = False
        # What an earlier attempt left is on the disk by now.
        self.synced = {info.st_ino: (info.st_size, info.st_mtime_ns) for _, info in self._files()}
        self._fsync = os.fsync
        os.fsync = self._noting_fsync  # type: ignore[assignment]
        for name, stage in stages._REMAINING.items():
            stages._REMAINING[name] = self._entering(name, stage)
        sys.addaudithook(self._hear)

    def _entering(self, name: str, stage: Callable[..., None]) -> Callable[..., None]:
        def run(*given: Any) -> None:
            self.stage = name
            stage(*given)

        return run

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        return [(path, path.stat()) for path in sorted(self.place.rglob("*")) if path.is_file()]

    def _noting_fsync(self, handle: int) -> None:
        self._count(os.readlink(f"/proc/self/fd/{handle}"))
        self._fsync(handle)
        info = os.fstat(handle)
        self.synced[info.st_ino] = info.st_size, info.st_mtime_ns

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = given
            if set(mode or "") & set("wax+") or (mode is None and flags & _WRITING):
                self._count(path)
        elif event in _CHANGES:
            path, folder = _CHANGES[event]
            handle = -1 if folder is None else given[folder]
            self._count(given[path], f"/proc/self/fd/{handle}" if handle >= 0 else "")

    def _count(self, path: Any, folder: str = "") -> None:
        # A number is a file that is open already, and its opening was counted.
        if self.ending or isinstance(path, int) or not self._ours(path, folder):
            return
        self.counts[self.stage] += 1
        end = self.end
        if end and end.stage == self.stage and end.number == self.counts[self.stage]:
            self.ending = True
            if end.power:
                self._cut(random.Random(end.seed))
            os.kill(os.getpid(), signal.SIGKILL)

    def _ours(self, path: Any, folder: str) -> bool:
        start = os.readlink(folder) if folder else os.getcwd()
        return Path(start, os.fsdecode(path)).is_relative_to(self.place)

    def _cut(self, draw: random.Random) -> None:
        for path, info in self._files():
            size, changed = self.synced.get(info.st_ino, (0, 0))
            if (size, changed) != (info.st_size, info.st_mtime_ns):
                # Most file systems keep what was on the disk before a file grew; some promise nothing.
                least = min(size, info.st_size) if draw.random() < 0.5 else 0
                os.truncate(path, draw.randint(least, info.st_size))


def _small_reward_model() -> None:
    prepare.UTTERANCES, prepare.REWARD_STEPS = 600, 25


def attempt(plan: Plan, ready: int) -> None:
    """Run a command in a forked child; a byte on `ready` says that it has begun and takes signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf to it
    os.chdir(plan.place)
    os.environ["DETOXRL_CACHE"] = str(plan.place / "cache")
    _show_in(plan.shown)
    _small_reward_model()
    if plan.eager:
        checkpoint.SHARE = 1e9
    spy, dispatch = Spy(plan), cli._dispatch

    def noticed(words: Sequence[str]) -> None:
        os.write(ready, b"x")
        dispatch(words)
        # It is done: a signal from here on would meet the end of this process, which is not the command's. The
        # parent sees by the file that it came too late.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        (plan.shown / "counts.json").write_text(json.dumps(spy.counts))

    cli._dispatch = noticed
    cli.main(plan.words)


def _show_in(folder: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)


def long_run(place: Path, words: Sequence[str], every: int) -> None:
    """Run a command in a forked child, and append [steps done, MiB of memory] to memory.jsonl each `every` steps."""
    os.chdir(place)
    _show_in(place)
    process, append = psutil.Process(), RunFolder.append

    def measured(folder: RunFolder, name: str, record: dict[str, Any]) -> None:
        append(folder, name, record)
        if name == "metrics.jsonl" and (record["step"] + 1) % every == 0:
            with Path("memory.jsonl").open("a") as lines:
                lines.write(json.dumps([record["step"] + 1, process.memory_info().rss / 2**20]) + "\n")

    RunFolder.append = measured  # type: ignore[assignment, method-assign]
    cli.main(words)


def make_things(folder: Path) -> None:
    """Make what a user brings: tiny models t5 and gpt2, dialogues, and a reward function."""
    sys.path.insert(0, str(TESTS))
    from conftest import TINY  # type: ignore[import-not-found]

    folder.mkdir(parents=True)
    rows = generate_rows(0, {"train": 300})["train"]
    tokenizer = scratch_tokenizer([row.dialogue for row in rows] + [row.summary or "" for row in rows], vocab_size=300)
    for name in ("t5", "gpt2"):
        if name == "gpt2":  # no EOS behind the prompts of a causal model
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        torch.manual_seed(7)
        save_base(TINY[name](len(tokenizer)), tokenizer, folder / name)
    lines = [json.dumps({"dialogue": row.dialogue, "summary": row.summary}) + "\n" for row in rows[:60]]
    (folder / "mine.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)


# What it left


def unfinished(run: Path) -> str:
    """Return the first stage that is not finished; after the last one, the last one."""
    try:
        done = json.loads((run / "seconds.json").read_text())
    except (FileNotFoundError, ValueError):  # a torn one is for the resumed run to complain about
        done = {}
    return next((stage for stage in STAGES if stage not in done), STAGES[-1])


def untimed(path: Path) -> Any:
    """Return a file's content without what the clock decides."""
    if path.name == "seconds.json":
        return list(json.loads(path.read_text()))
    if path.name == "eval.json":
        return json.loads(path.read_text()) | {"seconds": None}
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in line.items() if "second" not in key} for line in lines]
    if path.name == "report.html":
        return re.sub(r"<summary>Timings, .*?</details>", "", path.read_text(), flags=re.DOTALL)
    if path.name == "manifest.json":  # it knows the digest of metrics.jsonl
        return json.loads(path.read_text()) | {"products/metrics.jsonl": None}
    return path.read_bytes()


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same apart from timings; a torn one holds nothing."""
    try:
        return bool(untimed(one) == untimed(other))
    except ValueError:
        return False


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def differences(found: Path, wanted: Path) -> list[str]:
    """Say how the run and the cache in one place differ from those of the run that was not stopped."""
    told = [f"{path.relative_to(found)} was left half written" for path in temporaries(found)]
    ours, theirs = names(found / "run"), names(wanted / "run")
    told += [f"run/{name} is missing" for name in sorted(theirs - ours)]
    told += [f"run/{name} is one too many" for name in sorted(ours - theirs) if not is_temporary(Path(name))]
    # An entry of the cache may be missing, when the kill came before it was made.
    both = {f"run/{name}" for name in ours & theirs} | {f"cache/{name}" for name in names(found / "cache")}
    for name in sorted(both):
        if not any(is_temporary(part) for part in (Path(name), *Path(name).parents)):
            folders = (wanted / name).is_dir() and (found / name).is_dir()
            if not folders and not ((wanted / name).is_file() and same(found / name, wanted / name)):
                told.append(f"{name} differs")
    return told


def temporaries(place: Path) -> list[Path]:
    return [path for path in sorted(place.rglob(".*")) if is_temporary(path)]


def torn(run: Path) -> list[str]:
    """Name the logs that hold a line which is no JSON."""
    wrong = []
    for path in (run / name for name in LOGS if (run / name).is_file()):
        try:
            [json.loads(line) for line in path.read_bytes().splitlines()]
        except ValueError:
            wrong.append(path.name)
    return wrong


def mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


if __name__ == "__main__":
    _small_reward_model()
    cli.main()
