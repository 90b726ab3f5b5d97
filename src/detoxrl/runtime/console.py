"""How does a run tell the person who watches it what it does?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = Console(stderr=True, highlight=False, markup=False)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show a bar on stderr with the time left; yields `reach(done, status)`."""
    columns = [TextColumn("{task.description:<16}"), BarColumn(24), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(compact=True), TextColumn("{task.fields[status]}", style="dim")]
    with Progress(*columns, console=log) as bar:
        task = bar.add_task(what, total=total, status="")
        yield lambda done, status: bar.update(task, completed=done, status=status)
