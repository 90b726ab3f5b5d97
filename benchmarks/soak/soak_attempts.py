"""What does one attempt of the soak test do until it ends or is killed, and are its files right?

An attempt calls the command line as the shell does and counts its file operations. It can kill itself before any of
them, as kill -9 does or as a power cut does, which also loses what was written but not flushed to disk.

    python benchmarks/soak/soak_attempts.py run quickstart ...     the same command in its own process, with the small
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

# The same number of threads everywhere, no GPU, no network. These must be set before torch is imported.
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
# For each audit event: the index of the argument with the changed path, and of the folder that it is relative to.
_CHANGES = {
    "os.rename": (1, 3), "os.remove": (0, 1), "os.mkdir": (0, 2), "os.rmdir": (0, 1), "os.truncate": (0, None),
    "shutil.copytree": (1, None), "shutil.copyfile": (1, None), "shutil.rmtree": (0, None),
}  # fmt: skip
_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_WRITING_MODES = set("wax+")


# The attempt


@dataclass(frozen=True, kw_only=True)
class KillPoint:
    """The file operation before which an attempt kills itself."""

    stage: str
    number: int  # Of the operation within the stage, from 1.
    power_cut: bool  # Also lose what is not flushed to disk.
    seed: int  # Determines how much of it is lost.


@dataclass(frozen=True, kw_only=True)
class AttemptPlan:
    """One attempt."""

    command: Sequence[str]
    folder: Path  # The working folder; everything is written below it.
    output: Path  # Folder for stdout, stderr, and counts.json with the number of file operations.
    checkpoints_often: bool  # Write a checkpoint at every step, instead of within 2 % of the time.
    stage: str  # The first unfinished stage.
    kill_at: KillPoint | None = None


class OperationCounter:
    """Counts the file operations of each stage in this process, and kills it at the planned one."""

    def __init__(self, plan: AttemptPlan) -> None:
        self.folder = plan.folder
        self.kill_at = plan.kill_at
        self.stage = plan.stage
        self.counts: Counter[str] = Counter()
        self._is_killing = False

        # Files of earlier attempts count as flushed.
        self._flushed = {info.st_ino: (info.st_size, info.st_mtime_ns) for _, info in self._files()}
        self._fsync = os.fsync
        os.fsync = self._noting_fsync  # type: ignore[assignment]
        for name, stage in stages._STAGES.items():
            stages._STAGES[name] = self._entering(name, stage)
        sys.addaudithook(self._hear)

    def _entering(self, name: str, stage: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: Any) -> object:
            self.stage = name
            return stage(*arguments)

        return run

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        return [(path, path.stat()) for path in sorted(self.folder.rglob("*")) if path.is_file()]

    def _noting_fsync(self, handle: int) -> None:
        self._count(os.readlink(f"/proc/self/fd/{handle}"))
        self._fsync(handle)
        info = os.fstat(handle)
        self._flushed[info.st_ino] = (info.st_size, info.st_mtime_ns)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & _WRITING_FLAGS if mode is None else _WRITING_MODES & set(mode)
            if writes:
                self._count(path)
        elif event in _CHANGES:
            path_index, folder_index = _CHANGES[event]
            handle = -1 if folder_index is None else arguments[folder_index]
            self._count(arguments[path_index], f"/proc/self/fd/{handle}" if handle >= 0 else "")

    def _count(self, path: Any, folder: str = "") -> None:
        # A number is an open file, whose opening was counted.
        if self._is_killing or isinstance(path, int) or not self._is_inside(path, folder):
            return

        self.counts[self.stage] += 1
        kill_at = self.kill_at
        if kill_at and kill_at.stage == self.stage and kill_at.number == self.counts[self.stage]:
            self._is_killing = True
            if kill_at.power_cut:
                self._lose_unflushed(random.Random(kill_at.seed))
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_inside(self, path: Any, folder: str) -> bool:
        start = os.readlink(folder) if folder else os.getcwd()
        return Path(start, os.fsdecode(path)).is_relative_to(self.folder)

    def _lose_unflushed(self, draw: random.Random) -> None:
        for path, info in self._files():
            size, changed = self._flushed.get(info.st_ino, (0, 0))
            if (size, changed) != (info.st_size, info.st_mtime_ns):
                # Most file systems keep the content from before a file grew; some guarantee nothing.
                smallest = min(size, info.st_size) if draw.random() < 0.5 else 0
                os.truncate(path, draw.randint(smallest, info.st_size))


def _use_small_reward_model() -> None:
    prepare.UTTERANCES = 600
    prepare.REWARD_STEPS = 25


def attempt(plan: AttemptPlan, ready: int) -> None:
    """Run a command in a forked child; write a byte to `ready` once it runs and handles signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background job ignores it.
    os.chdir(plan.folder)
    os.environ["DETOXRL_CACHE"] = str(plan.folder / "cache")
    _redirect_output(plan.output)
    _use_small_reward_model()
    if plan.checkpoints_often:
        checkpoint.SHARE = 1e9

    counter = OperationCounter(plan)
    dispatch = cli._dispatch

    def announced(words: Sequence[str]) -> None:
        os.write(ready, b"x")
        dispatch(words)
        # The command has finished. A later signal would hit the exit of this process, so it is blocked; the file tells
        # the parent that the signal came too late.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        (plan.output / "counts.json").write_text(json.dumps(counter.counts))

    cli._dispatch = announced
    cli.main(plan.command)


def _redirect_output(folder: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)


def long_run(folder: Path, command: Sequence[str], every: int) -> None:
    """Run a command in a forked child; every `every` steps append [step, MiB of memory] to memory.jsonl."""
    os.chdir(folder)
    _redirect_output(folder)
    process = psutil.Process()
    append = RunFolder.append

    def measured(run_folder: RunFolder, name: str, record: dict[str, Any]) -> None:
        append(run_folder, name, record)
        if name == "metrics.jsonl" and (record["step"] + 1) % every == 0:
            memory = process.memory_info().rss / 2**20
            with Path("memory.jsonl").open("a") as lines:
                lines.write(json.dumps([record["step"] + 1, memory]) + "\n")

    RunFolder.append = measured  # type: ignore[assignment, method-assign]
    cli.main(command)


def write_inputs(folder: Path) -> None:
    """Write a user's inputs: tiny models t5 and gpt2, dialogues, and a reward function."""
    sys.path.insert(0, str(TESTS))
    from conftest import TINY  # type: ignore[import-not-found]

    folder.mkdir(parents=True)
    rows = generate_rows(0, {"train": 300})["train"]
    texts = [row.text for row in rows] + [row.references[0] for row in rows]
    tokenizer = scratch_tokenizer(texts, vocab_size=300)
    for name in ("t5", "gpt2"):
        if name == "gpt2":  # Prompts of a causal model have no EOS.
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        torch.manual_seed(7)
        save_base(TINY[name](len(tokenizer)), tokenizer, folder / name)

    lines = [json.dumps({"dialogue": row.text, "summary": row.references[0]}) + "\n" for row in rows[:60]]
    (folder / "mine.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(REWARD)


# The files that it left


def unfinished(run: Path) -> str:
    """Return the first unfinished stage, or the last stage if all are finished."""
    try:
        finished = json.loads((run / "seconds.json").read_text())
    except (FileNotFoundError, ValueError):  # The resumed run reports a torn file.
        finished = {}
    return next((stage for stage in STAGES if stage not in finished), STAGES[-1])


def untimed(path: Path) -> Any:
    """Return a file's content without timings."""
    if path.name == "seconds.json":
        return list(json.loads(path.read_text()))
    if path.name == "eval.json":
        return json.loads(path.read_text()) | {"seconds": None}
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in line.items() if "second" not in key} for line in lines]
    if path.name == "report.html":
        return re.sub(r"<summary>Timings, .*?</details>", "", path.read_text(), flags=re.DOTALL)
    if path.name == "manifest.json":  # It contains the digest of metrics.jsonl, which has timings.
        return json.loads(path.read_text()) | {"products/metrics.jsonl": None}
    return path.read_bytes()


def same(first: Path, second: Path) -> bool:
    """Return whether two files are equal apart from timings; a torn file equals nothing."""
    try:
        return bool(untimed(first) == untimed(second))
    except ValueError:
        return False


def relative_names(folder: Path) -> set[str]:
    """Return the paths of everything below a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def differences(actual: Path, expected: Path) -> list[str]:
    """Return how the run and the cache differ from those of the uninterrupted run."""
    faults = [f"{path.relative_to(actual)} is a temporary file that was left" for path in temporaries(actual)]

    actual_names = relative_names(actual / "run")
    expected_names = relative_names(expected / "run")
    faults += [f"run/{name} is missing" for name in sorted(expected_names - actual_names)]
    for name in sorted(actual_names - expected_names):
        if not is_temporary(Path(name)):
            faults.append(f"run/{name} is not in the uninterrupted run")

    # An entry of the cache may be missing if the kill came before it was written.
    comparable = {f"run/{name}" for name in actual_names & expected_names}
    comparable |= {f"cache/{name}" for name in relative_names(actual / "cache")}
    for name in sorted(comparable):
        if any(is_temporary(part) for part in (Path(name), *Path(name).parents)):
            continue
        are_folders = (expected / name).is_dir() and (actual / name).is_dir()
        are_equal_files = (expected / name).is_file() and same(actual / name, expected / name)
        if not are_folders and not are_equal_files:
            faults.append(f"{name} differs")
    return faults


def temporaries(folder: Path) -> list[Path]:
    """Return the temporary files below a folder."""
    return [path for path in sorted(folder.rglob(".*")) if is_temporary(path)]


def torn(run: Path) -> list[str]:
    """Return the names of logs with a line that is not JSON."""
    torn_logs = []
    for name in LOGS:
        path = run / name
        if not path.is_file():
            continue
        try:
            for line in path.read_bytes().splitlines():
                json.loads(line)
        except ValueError:
            torn_logs.append(name)
    return torn_logs


def mib(folder: Path) -> float:
    """Return the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


if __name__ == "__main__":
    _use_small_reward_model()
    cli.main()
