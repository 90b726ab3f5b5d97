"""A wheel holds all that a run needs, and runs without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("detoxrl-*-py3-none-any.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "src/detoxrl"
    files = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files
    assert "detoxrl/data/embedded/models/base/model.safetensors" in packed


def test_a_run_prepares_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "DETOXRL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-P", "-m", "detoxrl", "prepare", "quickstart", "--data.limit", "200",
               "--evaluation.prompts", "10", "--rl.validation-prompts", "10", "--rl.batch-size", "32"]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "reward model: trained before, comes with detoxrl" in result.stderr
    assert (tmp_path / "runs/quickstart/reward/model.safetensors").is_file()
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())  # Models would be folders.
