"""How do several processes of one command start on this machine, and how do they end?"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

# Seconds that a process has to end by itself when it should.
_GRACE = 60.0


def launched() -> bool:
    """Return whether a launcher, ours or another, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(words: Sequence[str], number: int) -> int:
    """Run a command line in `number` processes of this machine, and return the main one's exit code, or less a signal.

    They meet at a store in this process, share the cores, and hear of signals what is sent on to the main one. torch's
    own launcher would tell the main one twice of a Ctrl-C, which ends a run without a checkpoint.
    """
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    place |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    place |= {"OMP_NUM_THREADS": max(1, torch.get_num_threads() // number)}

    def start(rank: int) -> "subprocess.Popen[bytes]":
        named = {name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
        command = [sys.executable, "-m", "detoxrl", *words]
        return subprocess.Popen(command, env={**os.environ, **named}, start_new_session=True)

    leader, *others = map(start, range(number))
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, lambda which, _: leader.send_signal(which))
    _wait(leader, others)
    for other in others:
        _wait(other, [leader])
    return int(leader.returncode)


def _wait(one: "subprocess.Popen[bytes]", others: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Wait until a process ends; once one of the others has failed or gone, not for long."""
    while one.poll() is None and not any(other.poll() is not None for other in others):
        time.sleep(0.1)
    try:
        one.wait(_GRACE)
    except subprocess.TimeoutExpired:
        one.kill()  # it waits for what will not come
        one.wait()
