"""Real processes without the seconds that each takes to import torch: forked from one that did so, and nothing else."""

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
from detoxrl.commands import doctor, run as stages, sweep
from detoxrl.training import helping
for line in sys.stdin:
    given, child = json.loads(line), os.fork()
    if child == 0:
        for number, name in enumerate((os.devnull, *given["output"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.chdir(given["cwd"])
        os.environ.clear()
        os.environ.update(given["environment"])
        sys.argv = ["detoxrl", *given["words"]]
        exec(given["code"], {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _parent() -> subprocess.Popen[str]:
    """Return the process that forks the others; it ends when this one does."""
    return subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def forked(
    words: Sequence[str], cwd: Path, environment: Mapping[str, str] = os.environ, code: str = MAIN
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own and return its exit code, negative for a signal, and what it said."""
    parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    with TemporaryDirectory() as folder:
        output = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        asked = {"words": words, "cwd": str(cwd), "environment": dict(environment), "code": code, "output": output}
        print(json.dumps(asked), file=parent.stdin, flush=True)
        ended = int(parent.stdout.readline())
        return subprocess.CompletedProcess([*words], ended, *(Path(name).read_text() for name in output))
