"""How does a test run a command in its own process without the seconds that importing torch takes?

One parent process imports torch once and does nothing else; each command runs in a fork of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

MAIN = "from detoxrl import cli; cli.main()"
PARENT = """
import json, os, sys
from detoxrl import cli
from detoxrl.commands import doctor, run, sweep

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in enumerate([os.devnull, request["stdout"], request["stderr"]]):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["detoxrl", *request["words"]]
        exec(request["code"], {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _parent() -> subprocess.Popen[str]:
    """Start the process that forks the others; it ends when its stdin closes, so together with this process."""
    return subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def forked(
    words: Sequence[str], cwd: Path, environment: Mapping[str, str] = os.environ, code: str = MAIN
) -> subprocess.CompletedProcess[str]:
    """Run `code` with the arguments `words` in a process of its own; return its exit code and its output.

    The exit code is negative when a signal ended the process.
    """
    parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None

    with TemporaryDirectory() as folder:
        stdout = Path(folder, "stdout")
        stderr = Path(folder, "stderr")
        request = {
            "words": words,
            "cwd": str(cwd),
            "environment": dict(environment),
            "code": code,
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        print(json.dumps(request), file=parent.stdin, flush=True)
        exit_code = int(parent.stdout.readline())
        return subprocess.CompletedProcess([*words], exit_code, stdout.read_text(), stderr.read_text())
