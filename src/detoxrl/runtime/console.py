"""How does a run tell the person who watches it what it is doing?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Timer

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

# Seconds after which a log without a terminal says what the program is busy with. Bad input is found sooner, so that
# its error is the only line.
_STATUS_DELAY = 5.0

# What each stage does, in a few words.
_PURPOSES = {
    "prepare": "prompts and reward model",
    "sft": "warm start and baselines",
    "train": "reinforcement learning",
    "evaluate": "before and after on held-out prompts",
    "report": "one page with the result",
}

log = Console(stderr=True, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: "45 s", "1 min 20 s", "2 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"

    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show a message on stderr while the block runs; without a terminal, print it as a line if the block takes long."""
    if _can_redraw():
        with log.status(message):
            yield
        return

    timer = Timer(_STATUS_DELAY, partial(log.print, message, soft_wrap=True))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class RunProgress:
    """In which stage of how many a run is, and how long the rest of it takes.

    The time of what has not begun yet follows from its share of the work and from the pace so far.
    """

    def __init__(self, stages: Sequence[str]) -> None:
        self._stages = list(stages)
        self._stage = ""
        self._work: dict[str, float] = {}
        self._timed_work = 0.0
        self._timed_seconds = 0.0

    def begin(self, stage: str) -> None:
        """Print which stage of how many begins, and what it does."""
        self._stage = stage
        log.print(f"[{self.position}] {stage}: {_PURPOSES[stage]}", soft_wrap=True)

    @property
    def position(self) -> str:
        """The current stage of how many: "3/5"; "" before the first one."""
        if not self._stage:
            return ""
        return f"{self._stages.index(self._stage) + 1}/{len(self._stages)}"

    def expect(self, work: Mapping[str, float]) -> None:
        """Take how much work is behind each progress bar, by its name and in the order of the bars, in any unit."""
        self._work = dict(work)

    def seconds_left(self, bar: str, share: float, seconds: float) -> float | None:
        """Return how long the bars after this one will take; None while that is unknown, and if none follows.

        `share` is the part of `bar` that was done in `seconds`.
        """
        bars = list(self._work)
        later = sum(self._work[name] for name in bars[bars.index(bar) + 1 :]) if bar in bars else 0.0
        timed_work = self._timed_work + share * self._work.get(bar, 0.0)
        if later == 0 or timed_work == 0:
            return None

        return later * (self._timed_seconds + seconds) / timed_work

    def end_bar(self, bar: str, share: float, seconds: float) -> None:
        """Remember how long a part of a bar took, for the time of later ones."""
        self._timed_work += share * self._work.get(bar, 0.0)
        self._timed_seconds += seconds if bar in self._work else 0.0


_run: RunProgress | None = None


@contextmanager
def run_progress(stages: Sequence[str]) -> Iterator[RunProgress]:
    """Show the progress inside the block as that of a run with these stages."""
    global _run
    _run = RunProgress(stages)
    try:
        yield _run
    finally:
        _run = None


def begin_stage(stage: str) -> None:
    """Print that a stage begins, if it is one of several."""
    if _run:
        _run.begin(stage)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show on stderr how much of `total` steps is done, and the time left; yields `reach(done, status)`.

    A terminal gets a bar. In a file (a CI log, nohup) a bar would show nothing before the end, so there a line is
    printed after each 10 % instead.
    """
    pace = _Pace(what, total)
    try:
        if _can_redraw():
            with _bar(pace) as reach:
                yield reach
        else:
            yield _ProgressLines(pace).reach
    finally:
        pace.end()


@contextmanager
def _bar(pace: "_Pace") -> Iterator[Callable[[int, str], None]]:
    columns = [
        TextColumn("{task.description:<16}"),
        BarColumn(10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
        # Of a narrow terminal the status gets what the other columns leave.
        TextColumn("{task.fields[status]}", style="dim", table_column=Column(no_wrap=True, ratio=1)),
    ]
    title = f"{_run.position} {pace.what}".lstrip() if _run else pace.what
    with Progress(*columns, console=log, expand=True) as bar:
        task = bar.add_task(title, total=pace.total, status="", left="")

        def reach(done: int, status: str) -> None:
            pace.reach(done)
            bar.update(task, completed=done, status=status, left=pace.left())

        yield reach


def _can_redraw() -> bool:
    return log.is_terminal and not log.is_dumb_terminal


class _Pace:
    """How fast the steps of a bar are made, and so how long the rest of them takes."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self._started = log.get_time()
        self._first_time: float | None = None
        self._first_done = 0

    def reach(self, done: int) -> None:
        # A resumed stage did its first steps in another process, so the pace counts from the first call.
        if self._first_time is None:
            self._first_time = log.get_time()
            self._first_done = done
        self.done = done

    def left(self) -> str:
        """Return the time left for this bar and for the run, or how long the bar took; "" while that is unknown."""
        if self.done == self.total:
            return f"took {duration(log.get_time() - self._started)}"

        share, seconds = self._timed()
        if share == 0:
            return ""
        here = seconds / share * (self.total - self.done) / self.total
        later = _run.seconds_left(self.what, share, seconds) if _run else None
        text = f"{duration(here)} left"
        return text if later is None else f"{text}, run {duration(here + later)}"

    def end(self) -> None:
        if _run:
            _run.end_bar(self.what, *self._timed())

    def _timed(self) -> tuple[float, float]:
        """Return which share of the bar was timed, in [0, 1], and its seconds."""
        if self._first_time is None:
            return 0.0, 0.0
        return (self.done - self._first_done) / self.total, log.get_time() - self._first_time


class _ProgressLines:
    """Prints a line whenever another tenth of a stage is done."""

    def __init__(self, pace: _Pace) -> None:
        self._pace = pace
        self._tenths_printed = 0

    def reach(self, done: int, status: str) -> None:
        pace = self._pace
        pace.reach(done)

        tenths = 10 * done // pace.total
        if tenths <= self._tenths_printed:
            return
        self._tenths_printed = tenths

        left = pace.left()
        line = f"{pace.what}: {100 * done // pace.total} % ({done} of {pace.total})"
        if left:
            line += f", {left}"
        if status:
            line += f"; {status}"
        log.print(line, soft_wrap=True)
