"""Runs of a user's own things, small enough to take seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from shutil import copytree, rmtree

from detoxrl import cli
from test_data import ODD, dialogue

REWARD = '''
"""Rewards of a user's own."""
import os, signal

def brevity(prompts, responses):
    if len(responses) in (4, 5):  # a validation: the calls that are counted are the others
        return [-len(text) / 10 for text in responses]
    if os.environ.get("INTERRUPT_AT") == str(len(calls)):
        signal.raise_signal(signal.Signals[os.environ.get("STOP_BY", "SIGINT")])
    bad = os.environ.get("FAIL_AT") == str(len(calls))
    calls.append(len(responses))
    return [float("nan") if bad else -len(text) / 10 for text in responses]

def short(prompts, responses):
    return [0.0]

def words(prompts, responses):
    return ["1.0" for _ in responses]

def undefined(prompts, responses):
    return [float("nan") if i == 1 else 0.0 for i, _ in enumerate(responses)]

calls = []
'''
# Small enough to run in seconds, with a critic and a judge that is always installed; spelt as a user would.
SMALL = [
    "--rl.algorithm", "ppo",
    "--rl.steps", "3", "--rl.batch-size", "8", "--rl.minibatch-size", "4", "--rl.microbatch-size", "4",
    "--rl.validate-every", "1", "--rl.lr", "1e-2", "--rl.validation-prompts", "5", "--evaluation.prompts", "8",
    "--evaluation.samples-per-prompt", "2", "--evaluation.bootstrap", "200", "--generation.max-new-tokens", "12",
    "--reward.normalise-on", "16", "--evaluation.primary-judge", "alt-profanity-check",
    "--evaluation.other-judges", "none",
]  # fmt: skip


def make_place(tmp_path: Path, bases: dict[str, Path], reward_folder: Path) -> Path:
    """A folder to work in, with the user's model, classifier, dialogues and reward functions."""
    copytree(bases["t5"], tmp_path / "model")
    copytree(reward_folder, tmp_path / "classifier")
    rows = [
        {"dialogue": ODD + dialogue(i, " Oh crap!"), "summary": f"They talk about {i}, “all” 😀."} for i in range(40)
    ]
    rows += [{"dialogue": "", "summary": "x"}, rows[0], {"dialogue": "word " * 1000, "summary": "Long."}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "broken.py").write_text("def f(prompts, responses):\n    return [0.0 for\n")
    return tmp_path


def kept_run(folder: Path, bases: dict[str, Path], reward_folder: Path, words: Sequence[str]) -> Path:
    """Make a run in the new place `folder`/there, and return a copy of that place, for `as_it_was`."""
    place = folder / "there"
    place.mkdir()
    make_place(place, bases, reward_folder)
    with chdir(place):
        assert detoxrl(words) == 0
    return Path(copytree(place, folder / "kept"))


def as_it_was(kept: Path) -> Path:
    """Return the place of a kept run as it was then. It is always the same, because runs name their parts by path."""
    place = kept.with_name("there")
    rmtree(place, ignore_errors=True)
    copytree(kept, place)
    return place


def own(*words: str) -> list[str]:
    return ["run", "own", "--policy.base", "model", "--reward.classifier", "classifier", "--data.source", "mine.jsonl",
            *SMALL, *words]  # fmt: skip


def detoxrl(words: Sequence[str]) -> int:
    """Run a command in this process and return its exit code."""
    try:
        cli.main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def contents(place: Path) -> dict[Path, bytes]:
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return {path.relative_to(place): path.read_bytes() for path in files if "__pycache__" not in path.parts}


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints/train").iterdir())


def without_timings(path: Path) -> list[dict[str, object]]:
    with path.open() as lines:
        records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if "second" not in k} for record in records]


def same_end(one: Path, other: Path) -> None:
    """Fail unless two runs hold the same, timings and the name of their folder aside."""
    names = {str(path) for run in (one, other) for path in contents(run)}
    timed = {"metrics.jsonl", "seconds.json", "eval.json", "report.html", "config.json", "manifest.json"}
    for name in sorted(name for name in names if Path(name).name not in timed):
        # An adapter names the base it belongs to by its path.
        found = [(run / name).read_bytes().replace(str(run.resolve()).encode(), b"RUN") for run in (one, other)]
        assert found[0] == found[1], name
    assert without_timings(one / "metrics.jsonl") == without_timings(other / "metrics.jsonl")
    results = [json.loads((run / "eval.json").read_text()) for run in (one, other)]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}
