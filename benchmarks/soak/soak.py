"""Does a run that is killed at any moment and then resumed end bit-identical to an uninterrupted run?

Small runs of all stages (prepare with its reward model, sft with warm start and baseline, train, evaluate, report) are
killed at random moments and resumed until they finish. Then every file must equal the one of the uninterrupted run,
timings aside, and no temporary file may be left. The kinds of kill:

  time        kill -9 after a random time
  operation   kill -9 before a random file operation (soak_attempts.py counts them) of a random stage
  power       the same, and files are truncated that had not been flushed to disk: a power cut
  term, int   SIGTERM, Ctrl-C: the exit code must be 143 or 130 within 10 s, and the message must say how to resume

The uninterrupted run has its own process. The others are children of one process that has imported all libraries and
computed nothing, which saves 5 s for each. In each scenario two children first run to the end and must be
bit-identical: one writes a checkpoint at every step, the other as few as a user's run. Linux only.

    python benchmarks/soak/soak.py --kills 100 --seed 0 --out soak.jsonl     about 10 minutes on 2 cores
    python benchmarks/soak/soak.py --seed 0 --only-round 7                   repeat one round
    python benchmarks/soak/soak.py --long 2000                               one run of 2,000 steps: does memory grow?

The exit code is 1 if a run differs; its files are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import soak_attempts
from detoxrl.runtime.run_folder import STAGES
from soak_attempts import (
    AttemptPlan,
    KillPoint,
    attempt,
    differences,
    long_run,
    mib,
    temporaries,
    torn,
    unfinished,
    write_inputs,
)

MODES = ("time", "operation", "power", "term", "int")
SIGNALS = {"time": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
EXIT_CODES = {"time": -9, "operation": -9, "power": -9, "term": 143, "int": 130}
FORK = get_context("fork")
ATTEMPT_LIMIT = 300  # Maximum seconds of an attempt.
STOP_LIMIT = 10  # Maximum seconds from SIGTERM or SIGINT to the exit.
SPARE_MIB = 1  # Above the doctor's estimate, which does not count tokenizer, logs and report.
SAMPLE_EVERY = 100  # Steps between two samples of memory in a long run.
SMALL = [
    "--rl.batch-size", "8", "--rl.minibatch-size", "4", "--rl.microbatch-size", "4", "--rl.steps", "6",
    "--rl.validate-every", "2", "--rl.validation-prompts", "8", "--rl.lr", "1e-2", "--reward.normalise-on", "16",
    "--generation.max-new-tokens", "12", "--generation.batch-size", "8", "--evaluation.prompts", "12",
    "--evaluation.samples-per-prompt", "2", "--evaluation.bootstrap", "200", "--sft.batch-size", "8",
]  # fmt: skip
OWN = ["own", *SMALL, "--data.source", "../inputs/mine.jsonl", "--reward.function", "../inputs/reward.py:brevity"]
LORA = [*OWN, "--policy.base", "../inputs/t5", "--policy.lora-rank", "4"]
SCENARIOS = {
    "quickstart": ["quickstart", *SMALL, "--data.limit", "96", "--sft.steps", "20", "--sft.baseline-steps", "8"],
    "lora": [*LORA, "--sft.no-full-weights", "--sft.steps", "10", "--rl.kl-target", "0.5", "--rl.kl-horizon", "40"],
    "full": [*OWN, "--policy.base", "../inputs/gpt2", "--policy.full-weights", "--data.max-prompt-tokens", "100",
             "--sft.steps", "0"],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an uninterrupted attempt takes."""

    seconds: float
    stages: dict[str, float]
    operations: dict[str, int]
    largest_mib: float  # The maximum size of the folder at any time.

    def seconds_from(self, stage: str) -> float:
        """Return the approximate seconds of an attempt that starts with a stage."""
        finished = STAGES[: STAGES.index(stage)]
        return self.seconds - sum(self.stages[name] for name in finished)


@dataclass(frozen=True, kw_only=True)
class Timeout:
    """When an attempt gets a signal, and which."""

    delay: float = ATTEMPT_LIMIT  # Seconds.
    number: int = signal.SIGKILL


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended."""

    code: int
    seconds: float
    after_signal: float  # Seconds from the signal to the exit.
    ignored: bool  # The signal came before the command had finished, but the command ran to its end.


@dataclass(kw_only=True)
class Kill:
    """One kill of an attempt."""

    mode: str
    stage: str
    moment: str  # Seconds since the start, or the stage and number of a file operation.
    inside_write: bool
    mib: float  # Size of the folder at the kill.
    stopped_in: float  # Seconds from the signal to the exit.

    def describe(self) -> str:
        """Return the kill in words."""
        where = " inside a write" if self.inside_write else ""
        return f"{self.mode} in {self.stage}{where}"


@dataclass(kw_only=True)
class Round:
    """A run that is killed one to three times."""

    round: int
    seed: int
    scenario: str
    checkpoints_often: bool
    kills: list[Kill] = field(default_factory=list)
    too_late: list[str] = field(default_factory=list)  # Kills that came after the run had finished.
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def describe(self) -> str:
        """Return the round in words: its kills, and its faults."""
        often = "each step" if self.checkpoints_often else "few"
        kills = [kill.describe() for kill in self.kills] + [f"too late: {moment}" for moment in self.too_late]
        result = "; ".join(self.faults) or "equal"
        return f"round {self.round}: {self.scenario}, checkpoints {often}: {', '.join(kills)}: {result}"


def start_attempt(plan: AttemptPlan) -> Any:
    """Start an attempt; return its process once the command runs and handles signals."""
    reader, writer = os.pipe()
    process = FORK.Process(target=attempt, args=(plan, writer))
    process.start()
    os.close(writer)
    os.read(reader, 1)  # Returns at once if the process is dead.
    os.close(reader)
    return process


def run_in_child(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function that uses torch in a forked child, so that this process never does."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit(f"{function.__name__} failed with exit code {process.exitcode}; its files are kept in {arguments[0]}")


class Bench:
    """Runs attempts in one folder, because some files of a run contain its path."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work = work
        self.seed = seed
        self.folder = work / "current"
        self.run_folder = self.folder / "run"
        self.output = work / "output"
        self.output.mkdir(parents=True)
        self.measured: dict[tuple[str, bool], Measured] = {}
        run_in_child(write_inputs, work / "inputs")

    def clear(self) -> None:
        """Empty the folder in which attempts run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "cache").mkdir(parents=True)

    def command(self, scenario: str) -> list[str]:
        """Return the command that starts the run, or resumes it as the messages say."""
        if (self.run_folder / "config.json").is_file():
            return ["run", "--resume", "--run-dir", "run"]
        return ["run", *SCENARIOS[scenario], "--resume", "--run-dir", "run"]

    def attempt(
        self,
        scenario: str,
        checkpoints_often: bool,
        kill_at: KillPoint | None = None,
        timeout: Timeout = Timeout(),
    ) -> Ended:
        """Start or resume the run, and wait until it ends or gets a signal and then ends."""
        (self.output / "counts.json").unlink(missing_ok=True)
        plan = AttemptPlan(
            command=self.command(scenario),
            folder=self.folder,
            output=self.output,
            checkpoints_often=checkpoints_often,
            stage=unfinished(self.run_folder),
            kill_at=kill_at,
        )
        process = start_attempt(plan)
        started = time.monotonic()
        process.join(timeout.delay)

        signalled = time.monotonic()
        had_finished = True
        if process.exitcode is None:
            had_finished = (self.output / "counts.json").is_file()
            os.kill(process.pid, timeout.number)
            process.join(ATTEMPT_LIMIT)
            process.kill()
            process.join()

        now = time.monotonic()
        return Ended(
            code=process.exitcode,
            seconds=now - started,
            after_signal=now - signalled,
            ignored=process.exitcode == 0 and not had_finished,
        )

    def last_error(self) -> str:
        """Return the last line that the last attempt wrote to stderr."""
        lines = (self.output / "stderr").read_text().splitlines()
        return lines[-1] if lines else ""

    def reference(self, scenario: str) -> Path:
        """Return the folder of the uninterrupted run."""
        return self.work / "reference" / scenario

    def measure(self, scenario: str) -> None:
        """Make the uninterrupted run, and measure two in children, which must be bit-identical to it."""
        self.clear()
        command = [sys.executable, str(Path(soak_attempts.__file__)), *self.command(scenario)]
        environment = os.environ | {"DETOXRL_CACHE": str(self.folder / "cache")}
        alone = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if alone.returncode:
            sys.exit(f"{scenario} fails: {alone.stderr}")
        self.reference(scenario).parent.mkdir(exist_ok=True)
        self.folder.rename(self.reference(scenario))

        largest = self.estimated_mib(scenario) + SPARE_MIB
        for checkpoints_often in (True, False):
            self.clear()
            ended = self.attempt(scenario, checkpoints_often)
            faults = self.faults_at_the_end(scenario, ended.code)
            if faults:
                sys.exit(f"{scenario} differs in a forked child: {faults}; its files are kept in {self.work}")

            measured = Measured(
                seconds=ended.seconds,
                stages=json.loads((self.run_folder / "seconds.json").read_text()),
                operations=json.loads((self.output / "counts.json").read_text()),
                largest_mib=largest,
            )
            self.measured[scenario, checkpoints_often] = measured
            took = f"{ended.seconds:.1f} s, {measured.stages}, operations {measured.operations}"
            print(f"{scenario}, uninterrupted: {took}", flush=True)

    def estimated_mib(self, scenario: str) -> float:
        """Return the doctor's estimate of disk use in MiB."""
        self.clear()
        command = ["doctor", *SCENARIOS[scenario], "--run-dir", "run"]
        plan = AttemptPlan(
            command=command, folder=self.folder, output=self.output, checkpoints_often=False, stage=STAGES[0]
        )
        start_attempt(plan).join()
        estimate = re.search(r"disk: up to ([\d,.]+) MiB", (self.output / "stdout").read_text())
        if estimate is None:
            sys.exit(f"{command} prints no estimate: {self.last_error()}")
        return float(estimate[1].replace(",", ""))

    def round(self, number: int, only_scenario: str | None) -> Round:
        """Start a run, kill it one to three times, and let the last attempt finish."""
        draw = random.Random(f"{self.seed} {number}")
        scenario = draw.choice(list(SCENARIOS))
        checkpoints_often = draw.random() < 0.5
        scenario = only_scenario or scenario
        result = Round(round=number, seed=self.seed, scenario=scenario, checkpoints_often=checkpoints_often)

        started = time.monotonic()
        if (scenario, checkpoints_often) not in self.measured:
            self.measure(scenario)
        self.clear()

        code = None
        for _ in range(draw.randint(1, 3)):
            code = self.kill(result, draw)
            if code is not None:
                break
        if code is None:
            code = self.attempt(scenario, checkpoints_often).code

        result.faults += self.faults_at_the_end(scenario, code)
        result.seconds = round(time.monotonic() - started, 1)
        if result.faults:
            kept = self.work / f"round-{number}"
            self.folder.rename(kept)
            shutil.copytree(self.output, kept / "output")
        return result

    def kill(self, result: Round, draw: random.Random) -> int | None:
        """Make an attempt to be killed and record the kill; return its exit code if it finished first."""
        mode = draw.choice(MODES)
        if mode in SIGNALS:
            moment, ended = self._kill_by_signal(result, mode, draw)
        else:
            moment, ended = self._kill_at_operation(result, mode, draw)

        if ended.code != EXIT_CODES[mode]:
            result.too_late.append(f"{mode} at {moment}")
            if ended.ignored:
                result.faults.append(f"{mode} at {moment} was ignored")
            return ended.code

        kill = Kill(
            mode=mode,
            stage=unfinished(self.run_folder),
            moment=moment,
            inside_write=bool(temporaries(self.folder)),
            mib=round(mib(self.run_folder), 2),
            stopped_in=round(ended.after_signal, 2),
        )
        result.kills.append(kill)
        if ended.seconds > ATTEMPT_LIMIT:
            result.faults.append(f"{mode} at {moment}: hung for {ATTEMPT_LIMIT} s")
        result.faults += self.faults_after(result, kill)
        return None

    def _kill_by_signal(self, result: Round, mode: str, draw: random.Random) -> tuple[str, Ended]:
        measured = self.measured[result.scenario, result.checkpoints_often]
        delay = draw.uniform(0, measured.seconds_from(unfinished(self.run_folder)))
        timeout = Timeout(delay=delay, number=SIGNALS[mode])
        return f"{delay:.3f} s", self.attempt(result.scenario, result.checkpoints_often, timeout=timeout)

    def _kill_at_operation(self, result: Round, mode: str, draw: random.Random) -> tuple[str, Ended]:
        operations = self.measured[result.scenario, result.checkpoints_often].operations
        remaining = STAGES[STAGES.index(unfinished(self.run_folder)) :]
        stage = draw.choice([name for name in remaining if operations.get(name)])
        number = draw.randint(1, operations[stage])
        kill_at = KillPoint(stage=stage, number=number, power_cut=mode == "power", seed=draw.randrange(2**32))
        ended = self.attempt(result.scenario, result.checkpoints_often, kill_at)
        return f"{stage} {number} of {operations[stage]}", ended

    def faults_at_the_end(self, scenario: str, code: int) -> list[str]:
        """Return how the finished run differs from the uninterrupted one."""
        if code:
            return [f"exit code {code}: {self.last_error()}"]
        return differences(self.folder, self.reference(scenario))

    def faults_after(self, result: Round, kill: Kill) -> list[str]:
        """Return what is wrong after a kill."""
        faults = []
        if all(earlier.mode != "power" for earlier in result.kills):
            faults += [f"{name} has a line that is not JSON" for name in torn(self.run_folder)]

        largest = self.measured[result.scenario, result.checkpoints_often].largest_mib
        if kill.mib > largest:
            faults.append(f"{kill.mib} MiB, which is more than {largest}")

        if kill.mode in ("term", "int"):
            if not self._explains_the_stop(self.last_error()):
                faults.append(f"the last line is {self.last_error()!r}")
            if kill.stopped_in > STOP_LIMIT:
                faults.append(f"{kill.stopped_in} s to stop")
        return [f"{kill.mode} at {kill.moment}: {fault}" for fault in faults]

    def _explains_the_stop(self, message: str) -> bool:
        """Return whether a message says how to resume, or that there is nothing to resume."""
        if "nothing was started" in message:  # In the first milliseconds.
            return True
        if (self.run_folder / "config.json").is_file():
            return "resume with" in message and "--resume" in message
        return "nothing was written" in message


def soak(bench: Bench, options: argparse.Namespace) -> int:
    """Make rounds until there are `options.kills` kills; return the exit code."""
    rounds: list[Round] = []
    number = options.only_round or 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    while sum(len(finished.kills) for finished in rounds) < options.kills:
        result = bench.round(number, options.scenario)
        rounds.append(result)
        with options.out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(result)) + "\n")

        print(f"{result.describe()} ({result.seconds} s)", flush=True)
        if result.faults:
            flags = f"--seed {result.seed} --only-round {number} --scenario {result.scenario}"
            repeat = f"python benchmarks/soak/soak.py {flags}"
            print(f"  files: {bench.work}/round-{number}; repeat: {repeat}: {asdict(result)}", flush=True)
        if options.only_round is not None:
            break
        number += 1

    print(summary(rounds))
    return 1 if any(finished.faults for finished in rounds) else 0


def summary(rounds: Sequence[Round]) -> str:
    """Return the kills by stage and kind as a Markdown table, and the totals."""
    kills = [kill for finished in rounds for kill in finished.kills]
    counts = Counter((kill.stage, kill.mode) for kill in kills)
    lines = ["", f"| | {' | '.join(MODES)} |", f"|---|{'---:|' * len(MODES)}"]
    for stage in STAGES:
        cells = [str(counts[stage, mode]) for mode in MODES]
        lines.append(f"| {stage} | {' | '.join(cells)} |")

    killed = [finished for finished in rounds if finished.kills]
    equal = sum(not finished.faults for finished in killed)
    inside = sum(kill.inside_write for kill in kills)
    late = sum(len(finished.too_late) for finished in rounds)
    largest = max((kill.mib for kill in kills), default=0)
    longest = max((kill.stopped_in for kill in kills if kill.mode in ("term", "int")), default=0)
    lines += [
        "",
        f"{len(rounds)} rounds, {len(kills)} kills, {inside} of them inside a write, {late} more came too late",
        f"{len(killed)} runs were killed and resumed, {equal} ended bit-identical and without other faults",
        f"largest folder {largest} MiB; longest stop after SIGTERM or SIGINT {longest} s",
    ]
    return "\n".join(lines)


def measure_growth(work: Path, steps: int) -> None:
    """Run `steps` steps of the small T5, and print how its memory and its files grow."""
    run_in_child(write_inputs, work / "inputs")
    folder = work / "current"
    folder.mkdir(parents=True)
    lengths = ["--rl.steps", str(steps), "--rl.validate-every", "50"]
    run_in_child(long_run, folder, ["run", *LORA, *lengths, "--run-dir", "run"], SAMPLE_EVERY)

    samples = np.array([json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()])
    for step, memory in samples:
        print(f"step {step:.0f}: {memory:.1f} MiB")
    settled = samples[samples[:, 0] >= 200]
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * 100
    print(f"memory grows by {slope:.3f} MiB in 100 steps, by least squares from step 200 on")

    for name in ("metrics.jsonl", "rollouts.jsonl"):
        print(f"{name}: {(folder / 'run' / name).stat().st_size / 2**20:.2f} MiB")
    print(f"checkpoints: {mib(folder / 'run/checkpoints'):.2f} MiB")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=100, metavar="N", help="number of kills (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="determines scenarios, kinds and moments (%(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("soak.jsonl"),
        help="file to which each round is appended as one line (%(default)s)",
    )
    add("--scenario", choices=SCENARIOS, help="only this scenario; by default each round draws one")
    add("--only-round", type=int, metavar="N", help="only this round; a timed kill may hit another moment")
    add("--work", type=Path, metavar="DIR", help="new folder to work in, which is kept; default: a temporary one")
    steps = "instead of killing: print how the memory of one run of N PPO steps grows; N is at least 300"
    add("--long", type=int, metavar="N", help=steps)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    work = (options.work or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    code = 0
    if options.long:
        measure_growth(work, options.long)
    else:
        code = soak(Bench(work, options.seed), options)
    if code == 0 and options.work is None:
        shutil.rmtree(work)
    return code


if __name__ == "__main__":
    sys.exit(main())
