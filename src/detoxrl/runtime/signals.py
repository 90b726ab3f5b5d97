"""What happens when the user or the cluster stops the program?"""

import math
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# A launcher (torchrun, accelerate launch) forwards the signals it receives. A process that it started then hears one
# Ctrl-C twice within moments: from the terminal and from the launcher, which may send SIGTERM too. Without this window
# the second would count as "stop now" and lose the step.
_SAME_REQUEST_SECONDS = 2.0


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which a cluster sends before it takes the machine away."""


_RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


def resume_hint(root: Path, command: str = "run") -> str:
    """Return the sentence that says how to resume a run or a sweep."""
    return f"resume with `detoxrl {command} --resume --run-dir {shlex.quote(str(root))}`"


class _StopHandler:
    """The signal handler of one `stop_signals` block, and the first request to stop that it received."""

    def __init__(self, announce: Callable[[str], None] | None) -> None:
        self._announce = announce
        self.requested: type[KeyboardInterrupt] | None = None
        self.requested_at = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self.requested_at < _SAME_REQUEST_SECONDS:
            return

        raised = _RAISED[signal.Signals(number)]
        if self.requested is not None:
            raise raised

        self.requested = raised
        self.requested_at = now
        if self._announce is None:
            raise raised
        self._announce("stopping after this step (Ctrl-C again: stop now and lose this step)")


@contextmanager
def stop_signals(
    announce: Callable[[str], None] | None = None,
) -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Turn Ctrl-C and SIGTERM inside the block into KeyboardInterrupt and Terminated.

    Without `announce` the first signal raises at once. With `announce` it only prints a message, and a later signal
    raises at once. Signals within 2 s of the first belong to it and do nothing. Yields a function that returns what the
    first signal asks to raise, or None. A request that nobody raised, or that Python swallowed (in a callback, say), is
    raised at the end of the block.
    """
    handler = _StopHandler(announce)
    previous = {}
    if threading.current_thread() is threading.main_thread():  # Python delivers signals to the main thread only
        for number in _RAISED:
            # A shell without job control starts background jobs with SIGINT ignored; that stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)

    try:
        yield lambda: handler.requested
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
            # The rest of this request may arrive while the exception is on its way through the enclosing block.
            if isinstance(earlier, _StopHandler):
                earlier.requested_at = max(earlier.requested_at, handler.requested_at)

    if handler.requested is not None:
        raise handler.requested
