"""The shape of a source tree: every number of the table against one counted by hand on a small tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from shape import main, measure

FILES = {
    "__init__.py": '"""A small tree."""\n',
    "cli.py": '''"""Parses."""

from toy.commands import run


def main():
    run.start(None, 1)
''',
    "errors.py": '''"""Says what is wrong."""

# Not a line of code.
LOW, HIGH = 0, 1


class Wrong(Exception):
    """A user's error."""

    def line(self, a, /, b, *c, d, **e):
        """One line."""
        first, second = self.args

        return first, second
''',
    "commands/__init__.py": "",
    "commands/run.py": """from toy.errors import Wrong
from toy.rl import loss as losses
from ..rl import kl


def start(folder, config):
    losses.loss(config, 1)
    kl.kl(1)
    kl.kl(folder.config)
    return Wrong(config)
""",
    "rl/__init__.py": "",
    "rl/kl.py": """def kl(config):
    return config
""",
    "rl/loss.py": """from toy.cli import main
from toy.rl.kl import kl


def loss(config, b):
    def inner(x):

        return x

    return kl(config)
""",
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    root = tmp_path / "toy"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_every_number_is_the_one_counted_by_hand(toy: Path) -> None:
    assert measure(toy, ["nowhere:main", "commands.run:start"]) == {
        "packages": "2",
        "flat modules beside the packages": "2",  # cli, errors
        "modules": "8",
        # cli -> commands.run; commands.run -> errors, rl.loss, rl.kl; rl.loss -> cli, rl.kl
        "import arrows between modules": "6",
        "arrows that climb": "1",  # rl.loss -> cli
        # loss, kl (from loss, then from start), Wrong
        "calls that pass the config on": "4 (from commands.run.start)",
        # Heights: kl 0, errors 0; loss, cli and run import one another: 1. So loss 1, kl 0, kl 0, Wrong 0.
        "such calls that go back up": "0",
        "code lines": "24",  # cli 3, errors 5, run 8, kl 2, loss 6
        "tokens": "161",  # cli 19, errors 44, run 55, kl 8, loss 35
        "tokens per code line": "6.7",
        "tuple assignments per 1,000 code lines": "41.7",  # LOW, HIGH: 1 of 24 lines
        "assignments to a tuple, in all": "2",
        "blank lines inside functions": "15.0%",  # 3 of 20: main 2, line 5, start 5, kl 2, loss 6 with inner
        "longest parameter list": "5 (`line`)",
        "functions with more than 6 parameters": "0",
        "median file, lines": "4.5",
        "largest file, lines": "14 (`errors`)",
        "median function, lines": "4",
        "largest function, lines": "6 (`loss`)",
    }


def test_a_call_to_a_higher_module_goes_back_up(toy: Path) -> None:
    (toy / "rl/loss.py").write_text(FILES["rl/loss.py"].replace("from toy.cli import main\n", ""))
    run = toy / "commands/run.py"
    run.write_text(run.read_text().replace("    return Wrong(config)\n", "    losses.loss(config)\n"))

    measured = measure(toy, ["commands.run:start"])

    # loss 1, kl 0, kl 0, loss 1: the last goes back up, and is not read again.
    assert measured["calls that pass the config on"] == "4 (from commands.run.start)"
    assert measured["such calls that go back up"] == "1"
    assert measured["arrows that climb"] == "0"


def test_a_tree_without_the_declared_order_or_the_start_shows_dashes(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy / "rl").rename(toy / "maths")
    main([str(toy), str(toy), "--from", "nowhere:main"])

    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == f"| | `{toy}` | `{toy}` |"
    assert "| arrows that climb | – | – |" in rows
    assert "| calls that pass the config on | – | – |" in rows
    assert "| such calls that go back up | – | – |" in rows
