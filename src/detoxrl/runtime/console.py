"""How does a run tell the person who watches it what it is doing?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Timer

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds after which a log without a terminal says what the program is busy with. Bad input is found sooner, so that
# its error is the only line.
_STATUS_DELAY = 5.0

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


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show on stderr how much of a stage of `total` steps is done; yields `reach(done, status)`.

    A terminal gets a bar. In a file (a CI log, nohup) a bar would show nothing before the end of the stage, so there a
    line is printed after each 10 % instead.
    """
    if not _can_redraw():
        yield _ProgressLines(what, total).reach
        return

    columns = [
        TextColumn("{task.description:<16}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[status]}", style="dim"),
    ]
    with Progress(*columns, console=log) as bar:
        task = bar.add_task(what, total=total, status="")

        def reach(done: int, status: str) -> None:
            bar.update(task, completed=done, status=status)

        yield reach


def _can_redraw() -> bool:
    return log.is_terminal and not log.is_dumb_terminal


class _ProgressLines:
    """Prints a line whenever another tenth of a stage is done."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._tenths_printed = 0
        self._started = log.get_time()
        self._first_time: float | None = None
        self._first_done = 0

    def reach(self, done: int, status: str) -> None:
        if self._first_time is None:
            self._first_time = log.get_time()
            self._first_done = done

        tenths = 10 * done // self._total
        if tenths <= self._tenths_printed:
            return
        self._tenths_printed = tenths

        line = f"{self._what}: {100 * done // self._total} % ({done} of {self._total}){self._time(done)}"
        if status:
            line += f"; {status}"
        log.print(line, soft_wrap=True)

    def _time(self, done: int) -> str:
        if done == self._total:
            return f", took {duration(log.get_time() - self._started)}"

        # A resumed stage did its first steps in another process, so the pace counts from the first call.
        steps = done - self._first_done
        if self._first_time is None or steps == 0:
            return ""
        seconds_per_step = (log.get_time() - self._first_time) / steps
        return f", {duration(seconds_per_step * (self._total - done))} left"
