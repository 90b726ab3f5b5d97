"""What happens when somebody stops the program?"""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as clusters send it before they take the machine away."""


def go_on_with(root: Path) -> str:
    """Return the words that tell how to go on with a run."""
    return f"go on with `detoxrl run --resume --run-dir {shlex.quote(str(root))}`"


_RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise inside the block; what Python swallows (in a callback, say) is raised at its end."""

    def stop(came: list[type[KeyboardInterrupt]]) -> None:
        raise came[0]

    with _hearing(stop):
        yield


@contextmanager
def stopping_between_steps(say: Callable[[str], None]) -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Yield a function that returns what to raise once Ctrl-C or SIGTERM came; the second one is raised at once.

    One that nobody asked about is raised at the end of the block.
    """

    def wait(came: list[type[KeyboardInterrupt]]) -> None:
        if len(came) > 1:
            raise came[-1]
        say("stopping at the end of this step, which is kept (again: at once, without it)")

    with _hearing(wait) as came:
        yield lambda: came[0] if came else None


@contextmanager
def _hearing(answer: Callable[[list[type[KeyboardInterrupt]]], None]) -> Iterator[list[type[KeyboardInterrupt]]]:
    """Answer each signal with a call on all that came, which is also yielded; the first is raised after the block."""
    came: list[type[KeyboardInterrupt]] = []
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield came
        return

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(_RAISED[signal.Signals(number)])
        answer(came)

    # What is ignored stays so: a shell without job control starts its background jobs deaf to Ctrl-C.
    heard = [number for number in _RAISED if signal.getsignal(number) != signal.SIG_IGN]
    earlier = {number: signal.signal(number, handle) for number in heard}
    try:
        yield came
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if came:
        raise came[0]
