"""Does a run that is killed at any moment, and then resumed, end bit for bit like one that never stopped?

Small runs of all stages (prepare with its reward model, sft with warm start and baseline, train, evaluate, report) are
ended again and again, at moments that are drawn, and resumed until they are done. Then every file must be the same as
in the run that was not stopped, apart from timings, and nothing half written may be left. The ways to end:

  time        kill -9 after a drawn time
  operation   kill -9 before a drawn operation on a file (benchmarks/soak_attempts.py counts them), in a drawn stage
  power       the same, and what had not been brought to the disk is cut: a power cut
  term, int   SIGTERM, Ctrl-C: the exit code must be 143 or 130 within 10 s, and the message say how to go on

The run that is not stopped is a process of its own. The others are children of one process that has imported all
libraries and computed nothing, which saves 5 s for each; in each scenario two of them first run to the end and have to
be the same to the bit, one with a checkpoint at each step and one with as few as a user's run has. Linux only.

python benchmarks/soak.py --kills 100 --seed 0 --out soak.jsonl     some 10 minutes on 2 cores
python benchmarks/soak.py --seed 0 --only-round 7                   one of its rounds again
python benchmarks/soak.py --long 2000                               one run of so many steps: does its memory grow?

Exits 1 when a run ended otherwise, and keeps what it left.
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
from soak_attempts import End, Plan, attempt, differences, long_run, make_things, mib, temporaries, torn, unfinished

MODES = ("time", "operation", "power", "term", "int")
SIGNALS = {"time": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
CODES = {"time": -9, "operation": -9, "power": -9, "term": 143, "int": 130}
FORK = get_context("fork")
LIMIT, STOP_LIMIT = 300, 10  # seconds that an attempt may take, and a stop after SIGTERM or SIGINT
SPARE = 1  # MiB that a folder may take above what the doctor says, which counts no tokenizer, log or report
SMALL = [
    "--rl.batch-size", "8", "--rl.minibatch-size", "4", "--rl.microbatch-size", "4", "--rl.steps", "6",
    "--rl.validate-every", "2", "--rl.validation-prompts", "8", "--rl.lr", "1e-2", "--reward.normalise-on", "16",
    "--generation.max-new-tokens", "12", "--generation.batch-size", "8", "--evaluation.prompts", "12",
    "--evaluation.samples-per-prompt", "2", "--evaluation.bootstrap", "200", "--sft.batch-size", "8",
]  # fmt: skip
OWN = ["own", *SMALL, "--data.source", "../things/mine.jsonl", "--reward.function", "../things/reward.py:brevity"]
LORA = [*OWN, "--policy.base", "../things/t5", "--policy.lora-rank", "4"]
SCENARIOS = {
    "quickstart": ["quickstart", *SMALL, "--data.limit", "96", "--sft.steps", "20", "--sft.baseline-steps", "8"],
    "lora": [*LORA, "--sft.no-full-weights", "--sft.steps", "10", "--rl.kl-target", "0.5", "--rl.kl-horizon", "40"],
    "full": [*OWN, "--policy.base", "../things/gpt2", "--policy.full-weights", "--data.max-prompt-tokens", "100",
             "--sft.steps", "0"],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an attempt that nobody stops takes."""

    seconds: float
    stages: dict[str, float]
    operations: dict[str, int]
    most_mib: float
    """What the folder may hold at any time."""

    def left(self, stage: str) -> float:
        """Return about how many seconds an attempt takes that begins with a stage."""
        return self.seconds - sum(self.stages[name] for name in STAGES[: STAGES.index(stage)])


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended."""

    code: int
    seconds: float
    after_signal: float
    """Seconds from the signal to the exit."""
    unheard: bool
    """SIGTERM or SIGINT came before the command was done, and it went on to its end."""


@dataclass(kw_only=True)
class Kill:
    """One end before the end."""

    mode: str
    stage: str
    moment: str
    """When: seconds, or the stage and number of a file operation."""
    inside_write: bool
    mib: float
    """Size of the folder then."""
    stopped_in: float
    """Seconds from the signal to the exit."""


@dataclass(kw_only=True)
class Round:
    """A run, ended one to three times."""

    round: int
    seed: int
    scenario: str
    eager: bool
    kills: list[Kill] = field(default_factory=list)
    too_late: list[str] = field(default_factory=list)
    """The kill that came when the run had ended already."""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def told(self) -> str:
        kills = (f"{k.mode} in {k.stage}{' inside a write' if k.inside_write else ''}" for k in self.kills)
        often = "each step" if self.eager else "few"
        told = ", ".join([*kills, *(f"too late: {moment}" for moment in self.too_late)])
        return f"round {self.round}: {self.scenario}, checkpoints {often}: {told}: {'; '.join(self.faults) or 'equal'}"


def begun(plan: Plan) -> Any:
    """Return the process of an attempt, once its command has begun and takes signals."""
    reader, writer = os.pipe()
    process = FORK.Process(target=attempt, args=(plan, writer))
    process.start()
    os.close(writer)
    os.read(reader, 1)  # or it is dead already
    os.close(reader)
    return process


def in_child(function: Callable[..., None], *given: Any) -> None:
    """Call a function that computes in a forked child, so that this process never does."""
    process = FORK.Process(target=function, args=given)
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit(f"{function.__name__} failed with exit code {process.exitcode}; {given[0]} keeps what it left")


class Bench:
    """Runs attempts in one place, whose path is the same for all: some products name it."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed, self.place, self.shown = work, seed, work / "place", work / "shown"
        self.shown.mkdir(parents=True)
        self.measured: dict[tuple[str, bool], Measured] = {}
        in_child(make_things, work / "things")

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        (self.place / "cache").mkdir(parents=True)

    def words(self, scenario: str) -> list[str]:
        """Return the command that begins the run, or goes on with it, as the messages say."""
        if (self.place / "run/config.json").is_file():
            return ["run", "--resume", "--run-dir", "run"]
        return ["run", *SCENARIOS[scenario], "--resume", "--run-dir", "run"]

    def attempt(
        self, scenario: str, eager: bool, end: End | None = None, delay: float = LIMIT, number: int = signal.SIGKILL
    ) -> Ended:
        """Begin the run or go on with it, until it ends or a signal ends it, which comes after `delay`."""
        (self.shown / "counts.json").unlink(missing_ok=True)
        stage, words = unfinished(self.place / "run"), self.words(scenario)
        plan = Plan(words=words, place=self.place, shown=self.shown, eager=eager, stage=stage, end=end)
        process, started, done = begun(plan), time.monotonic(), True
        process.join(delay)
        signalled = time.monotonic()
        if process.exitcode is None:
            done = (self.shown / "counts.json").is_file()
            os.kill(process.pid, number)
            process.join(LIMIT)
            process.kill()
            process.join()
        now, code = time.monotonic(), process.exitcode
        return Ended(code=code, seconds=now - started, after_signal=now - signalled, unheard=code == 0 and not done)

    def error(self) -> str:
        """Return the last line that the latest attempt wrote to stderr."""
        lines = (self.shown / "stderr").read_text().splitlines()
        return lines[-1] if lines else ""

    def reference(self, scenario: str) -> Path:
        return self.work / "reference" / scenario

    def measure(self, scenario: str) -> None:
        """Make the run that is not stopped, and measure two in children, which have to be the same."""
        self.clear()
        words = [sys.executable, str(Path(soak_attempts.__file__)), *self.words(scenario)]
        environment = os.environ | {"DETOXRL_CACHE": str(self.place / "cache")}
        alone = subprocess.run(words, cwd=self.place, env=environment, capture_output=True, text=True, check=False)
        if alone.returncode:
            sys.exit(f"{scenario} does not run: {alone.stderr}")
        self.reference(scenario).parent.mkdir(exist_ok=True)
        self.place.rename(self.reference(scenario))
        most = self.estimated_mib(scenario) + SPARE
        for eager in (True, False):
            self.clear()
            ended = self.attempt(scenario, eager)
            if wrong := self.wrong_at_the_end(scenario, ended.code):
                sys.exit(f"{scenario} runs otherwise in a forked child: {wrong}; {self.work} keeps it")
            stages = json.loads((self.place / "run/seconds.json").read_text())
            operations = json.loads((self.shown / "counts.json").read_text())
            self.measured[scenario, eager] = Measured(
                seconds=ended.seconds, stages=stages, operations=operations, most_mib=most
            )
            print(f"{scenario}, never stopped: {ended.seconds:.1f} s, {stages}, operations {operations}", flush=True)

    def estimated_mib(self, scenario: str) -> float:
        """Return what the doctor says about the disk."""
        self.clear()
        words = ["doctor", *(word for word in self.words(scenario)[1:] if word != "--resume")]
        begun(Plan(words=words, place=self.place, shown=self.shown, eager=False, stage=STAGES[0])).join()
        found = re.search(r"disk: up to ([\d,.]+) MiB", (self.shown / "stdout").read_text())
        return float(found[1].replace(",", "")) if found else sys.exit(f"{words} says nothing: {self.error()}")

    def round(self, number: int, only: str | None) -> Round:
        """Run a run, end it one to three times, and let the last attempt end by itself."""
        draw = random.Random(f"{self.seed} {number}")
        scenario, eager = draw.choice(list(SCENARIOS)), draw.random() < 0.5
        found = Round(round=number, seed=self.seed, scenario=only or scenario, eager=eager)
        started = time.monotonic()
        if (found.scenario, eager) not in self.measured:
            self.measure(found.scenario)
        self.clear()
        code = None
        for _ in range(draw.randint(1, 3)):
            if (code := self.kill(found, draw)) is not None:
                break
        if code is None:
            code = self.attempt(found.scenario, eager).code
        found.faults += self.wrong_at_the_end(found.scenario, code)
        found.seconds = round(time.monotonic() - started, 1)
        if found.faults:
            kept = self.work / f"round-{number}"
            self.place.rename(kept)
            shutil.copytree(self.shown, kept / "shown")
        return found

    def kill(self, found: Round, draw: random.Random) -> int | None:
        """Make an attempt that is to be killed, and note how that was; return its exit code if it was not."""
        mode, stage = draw.choice(MODES), unfinished(self.place / "run")
        measured, run = self.measured[found.scenario, found.eager], self.place / "run"
        if mode in SIGNALS:
            delay = draw.uniform(0, measured.left(stage))
            moment = f"{delay:.3f} s"
            ended = self.attempt(found.scenario, found.eager, delay=delay, number=SIGNALS[mode])
        else:
            aim = draw.choice([name for name in STAGES[STAGES.index(stage) :] if measured.operations.get(name)])
            nth = draw.randint(1, measured.operations[aim])
            moment = f"{aim} {nth} of {measured.operations[aim]}"
            end = End(stage=aim, number=nth, power=mode == "power", seed=draw.randrange(2**32))
            ended = self.attempt(found.scenario, found.eager, end)
        if ended.code != CODES[mode]:
            found.too_late.append(f"{mode} at {moment}")
            found.faults += [f"{mode} at {moment} was not heard"] if ended.unheard else []
            return ended.code
        kill = Kill(
            mode=mode, stage=unfinished(run), moment=moment, inside_write=bool(temporaries(self.place)),
            mib=round(mib(run), 2), stopped_in=round(ended.after_signal, 2),
        )  # fmt: skip
        found.kills.append(kill)
        found.faults += [f"{mode} at {moment}: hung for {LIMIT} s"] if ended.seconds > LIMIT else []
        found.faults += self.wrong(found, kill)
        return None

    def wrong_at_the_end(self, scenario: str, code: int) -> list[str]:
        """Say how the run that an attempt ended is not the one that was not stopped."""
        return [f"exit code {code}: {self.error()}"] if code else differences(self.place, self.reference(scenario))

    def wrong(self, found: Round, kill: Kill) -> list[str]:
        """Say what must not be after a kill."""
        run, faults = self.place / "run", []
        where = f"{kill.mode} at {kill.moment}"
        if all(one.mode != "power" for one in found.kills):
            faults += [f"{where}: {name} holds a line that is no JSON" for name in torn(run)]
        most = self.measured[found.scenario, found.eager].most_mib
        faults += [f"{where}: {kill.mib} MiB are more than {most}"] if kill.mib > most else []
        if kill.mode in ("term", "int"):
            made, said = (run / "config.json").is_file(), self.error()
            good = "go on with" in said and "--resume" in said if made else "nothing was written" in said
            good = good or "nothing was begun" in said  # in the first milliseconds
            faults += [] if good else [f"{where}: the last line is {said!r}"]
            faults += [f"{where}: {kill.stopped_in} s to stop"] if kill.stopped_in > STOP_LIMIT else []
        return faults


def soak(bench: Bench, options: argparse.Namespace) -> int:
    """Make rounds until there are as many kills as wanted; return the exit code."""
    rounds: list[Round] = []
    number = 0 if options.only_round is None else options.only_round
    while sum(len(one.kills) for one in rounds) < options.kills:
        one = bench.round(number, options.scenario)
        rounds.append(one)
        print(f"{one.told()} ({one.seconds} s)", flush=True)
        if one.faults:
            again = f"python benchmarks/soak.py --seed {one.seed} --only-round {number} --scenario {one.scenario}"
            print(f"  {bench.work}/round-{number} keeps it; {again} repeats it: {asdict(one)}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(one)) + "\n")
        number += 1
        if options.only_round is not None:
            break
    print(summary(rounds))
    return 1 if any(one.faults for one in rounds) else 0


def summary(rounds: Sequence[Round]) -> str:
    """Return the kills by stage and way as a Markdown table, and the totals."""
    kills = [kill for one in rounds for kill in one.kills]
    counts = Counter((kill.stage, kill.mode) for kill in kills)
    lines = ["", f"| | {' | '.join(MODES)} |", f"|---|{'---:|' * len(MODES)}"]
    for stage in STAGES:
        lines.append(f"| {stage} | {' | '.join(str(counts[stage, mode]) for mode in MODES)} |")
    killed = [one for one in rounds if one.kills]
    equal = sum(not one.faults for one in killed)
    inside = sum(kill.inside_write for kill in kills)
    largest = max((kill.mib for kill in kills), default=0)
    longest = max((kill.stopped_in for kill in kills if kill.mode in ("term", "int")), default=0)
    lines += [
        "",
        f"{len(rounds)} rounds, {len(kills)} kills, {inside} of them inside a write, "
        f"{sum(len(one.too_late) for one in rounds)} more came too late",
        f"{len(killed)} runs were killed and resumed, {equal} ended equal to the bit and with no other fault",
        f"largest folder {largest} MiB; longest stop after SIGTERM or SIGINT {longest} s",
    ]
    return "\n".join(lines)


def long(work: Path, steps: int) -> None:
    """Run so many steps of the small T5, and say how its memory and its files grow."""
    in_child(make_things, work / "things")
    place, every = work / "place", 100
    place.mkdir(parents=True)
    words = ["run", *LORA, "--rl.steps", str(steps), "--rl.validate-every", "50", "--run-dir", "run"]
    in_child(long_run, place, words, every)
    samples = np.array([json.loads(line) for line in (place / "memory.jsonl").read_text().splitlines()])
    for step, memory in samples:
        print(f"step {step:.0f}: {memory:.1f} MiB")
    settled = samples[samples[:, 0] >= 200]
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * 100
    print(f"memory grows by {slope:.3f} MiB in 100 steps, by least squares from step 200 on")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        print(f"{name}: {(place / 'run' / name).stat().st_size / 2**20:.2f} MiB")
    print(f"checkpoints: {mib(place / 'run/checkpoints'):.2f} MiB")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=100, metavar="N", help="rounds are made until there are so many (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="scenarios, ways and moments follow from it (%(default)s)")
    add("--out", type=Path, default=Path("soak.jsonl"), help="each round is appended as one line (%(default)s)")
    add("--scenario", choices=SCENARIOS, help="this one alone; else each round draws one")
    add("--only-round", type=int, metavar="N", help="this round alone; a timed kill may fall elsewhere")
    add("--work", type=Path, metavar="DIR", help="a new folder to work in, which is kept; else a temporary one")
    steps = "instead of killing: one run of N steps of PPO, at least 300, and how its memory grows"
    add("--long", type=int, metavar="N", help=steps)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    work = (options.work or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    code = 0
    if options.long:
        long(work, options.long)
    else:
        code = soak(Bench(work, options.seed), options)
    if code == 0 and options.work is None:
        shutil.rmtree(work)
    return code


if __name__ == "__main__":
    sys.exit(main())
