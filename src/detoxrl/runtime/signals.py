"""What happens when somebody stops the program?"""

import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as clusters send it before they take the machine away."""


def resume_hint(root: Path, command: str = "run") -> str:
    """Return the words that tell how to go on with a run, or with a sweep."""
    return f"go on with `detoxrl {command} --resume --run-dir {shlex.quote(str(root))}`"


_RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@contextmanager
def stop_signals(wait: Callable[[str], None] | None = None) -> Iterator[Callable[[], type[KeyboardInterrupt] | None]]:
    """Let Ctrl-C and SIGTERM raise inside the block; where there is `wait`, the first is only told to it.

    Yields a function that returns what to raise once one came. What nobody asked about or Python swallowed (in a
    callback, say) is raised at the end of the block.
    """
    came: list[type[KeyboardInterrupt]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(_RAISED[signal.Signals(number)])
        if wait is None or len(came) > 1:
            raise came[-1]
        wait("stopping at the end of this step, which is kept (again: at once, without it)")

    main = threading.current_thread() is threading.main_thread()  # signals reach no other
    # What is ignored stays so: a shell without job control starts its background jobs deaf to Ctrl-C.
    heard = [number for number in _RAISED if main and signal.getsignal(number) != signal.SIG_IGN]
    earlier = {number: signal.signal(number, handle) for number in heard}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if came:
        raise came[0]
