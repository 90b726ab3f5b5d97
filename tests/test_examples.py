"""The examples run as they stand, from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_file", "alt-profanity-check: "),
        ("own_reward", "reward -"),
        ("own_model", "reward classifier: "),  # measures what own_file trained
    ],
)
def test_an_example_runs_and_leaves_its_report(place: Path, name: str, words: str) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=place, env={**os.environ, "DETOXRL_CACHE": str(place / "cache")}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert words in result.stdout
    assert result.stdout.splitlines()[-1] == f"open runs/{name}/report.html"
    assert (place / "runs" / name / "report.html").stat().st_size > 10_000
