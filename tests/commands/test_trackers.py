"""A tracker shows every line of metrics.jsonl once, however often a run stops; without the flag none is contacted."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import defaultdict
from importlib import util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from detoxrl.commands import run as stages
from detoxrl.commands.tracker_state import resolve_tracker
from detoxrl.errors import InputError
from detoxrl.runtime import checkpoint
from detoxrl.runtime.checkpoint import Checkpoints
from detoxrl.runtime.run_folder import RunFolder
from forked import forked
from small_runs import contents, detoxrl, own, same_end

# With this seed a trained policy is kept, so there is a difference to send.
WORDS = [
    "--reward.function", "rewards.py:brevity", "--rl.quality-margin", "1", "--rl.validate-every", "2", "--seed", "3",
]  # fmt: skip
Series = dict[str, list[tuple[int, float]]]


def tensorboard(run: Path) -> tuple[Series, dict[str, dict[int, str]]]:
    """Return what tensorboard reads of a run: numbers and texts by name, each by step."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    numbers = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in tags["scalars"]}
    texts: dict[str, dict[int, str]] = defaultdict(dict)
    for name in tags["tensors"]:
        for event in events.Tensors(name):
            assert event.step not in texts[name.removesuffix("/text_summary")], name
            texts[name.removesuffix("/text_summary")][event.step] = tensor_util.make_ndarray(event.tensor_proto)[
                0
            ].decode()
    return numbers, texts


def lines(run: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / name).read_bytes().splitlines()]


def logged(run: Path) -> Series:
    """Return what a tracker should show of a run's training, from the files of the run."""
    series: Series = defaultdict(list)
    for name, prefix in (("metrics.jsonl", ""), ("validation.jsonl", "validation/")):
        for line in lines(run, name):
            for key in line.keys() - {"step"}:
                series[prefix + key].append((int(line["step"]), float(line[key])))
    return series


def same(shown: Series, run: Path) -> None:
    """Fail unless a tracker shows each number of the run's training once, at its step, and nothing else beside eval."""
    training = {name: points for name, points in shown.items() if not name.startswith("eval/")}
    assert training.keys() == logged(run).keys()
    for name, points in logged(run).items():
        assert [step for step, _ in training[name]] == [step for step, _ in points], name
        assert [value for _, value in training[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


def result(shown: Series, run: Path) -> None:
    """Fail unless a tracker shows quality and toxicity of the run's evaluation once, at its last step."""
    evaluation = json.loads((run / "eval.json").read_text())
    toxicity = evaluation["toxicity"][evaluation["primary_judge"]]
    for side in ("before", "after"):
        assert shown[f"eval/toxicity/{side}/mean"] == [(5, pytest.approx(toxicity[side]["mean"], rel=1e-6))]
        assert shown[f"eval/quality/rouge_l/{side}"] == [
            (5, pytest.approx(evaluation["quality"]["rouge_l"][side], rel=1e-6))
        ]
    assert shown["eval/toxicity/difference/low"] == [(5, pytest.approx(toxicity["difference"]["low"], rel=1e-6))]


def test_tensorboard_shows_each_number_of_a_run_once_with_its_config_and_masked_samples(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = own(*WORDS, "--rl.steps", "5")
    assert detoxrl([*words, "--run-dir", "plain"]) == 0
    table = re.sub(r"(?m)^.* s in total: .*$", "", capfd.readouterr().out)
    assert detoxrl([*words, "--run-dir", "run", "--track", "tensorboard"]) == 0
    assert re.sub(r"(?m)^.* s in total: .*$", "", capfd.readouterr().out) == table.replace("plain", "run")
    assert {path.name for path in (place / "run").iterdir()} - {path.name for path in (place / "plain").iterdir()} == {
        "tensorboard", "tracker.json",
    }  # fmt: skip
    numbers, texts = tensorboard(place / "run")
    same(numbers, place / "run")
    result(numbers, place / "run")
    assert "| rl.steps | 5 |" in texts["config"][0]
    assert texts["rollouts"].keys() <= set(range(5))
    assert 4 in texts["rollouts"]  # with the checkpoint at the end
    assert texts["rollouts"][4].count("\n") == 5
    assert texts["samples"][5].count("\n") == 9


def test_only_the_first_letter_of_toxic_words_is_shown(place: Path) -> None:
    assert detoxrl(own(*WORDS, "--run-dir", "run")) == 0
    run = RunFolder(place / "run")
    kept = run / "checkpoints/train/step-00000003/products/rollouts.jsonl"
    text = "Crap! Two\nidiots | and a moron <b>said</b> scrap."
    kept.write_text(
        "".join(json.dumps({"step": 2, "id": "a", "response": text, "score": 0.5}) + "\n" for _ in range(2))
    )
    samples = lines(place / "run", "samples.jsonl")
    for line in samples:
        line["responses"] = {"before": [text], "after": ["CRAP, fuck."]}
    run.write("samples.jsonl", "".join(json.dumps(line) + "\n" for line in samples))
    assert detoxrl(["run", "--resume", "--run-dir", "run", "--track", "tensorboard"]) == 0
    numbers, texts = tensorboard(place / "run")
    same(numbers, place / "run")  # A finished run is sent too.
    hidden = "C•••! Two i••••• \\| and a m•••• <b>said</b> scrap."
    assert texts["rollouts"][2].splitlines()[2] == f"| 2 | a | {hidden} | 0.5 |"
    assert texts["samples"][3].splitlines()[2].startswith(f"| {hidden} | C•••, f•••. | ")


def test_an_initial_policy_that_was_kept_has_no_difference_and_no_responses_after(place: Path) -> None:
    assert detoxrl(own("--rl.lr", "1e-12", "--run-dir", "run", "--track", "tensorboard")) == 0
    numbers, texts = tensorboard(place / "run")
    assert "eval/toxicity/before/mean" in numbers
    assert not [name for name in numbers if "difference" in name or "relative" in name]
    assert texts["samples"][3].splitlines()[0] == "| before | toxicity before |"


def test_a_run_that_is_stopped_and_killed_is_one_series_without_a_step_twice(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = own(*WORDS, "--rl.steps", "5")
    assert detoxrl([*words, "--run-dir", "whole"]) == 0
    monkeypatch.setenv("INTERRUPT_AT", "3")  # Call 0 is the probe, 1 the normaliser, 2 step 0, 3 step 1.
    assert detoxrl([*words, "--run-dir", "run", "--track", "tensorboard"]) == 130
    monkeypatch.delenv("INTERRUPT_AT")
    begun = json.loads((place / "run/tracker.json").read_text())
    assert begun["sent"]["metrics.jsonl"] == 2
    with monkeypatch.context() as crash:  # The resumed run dies a step later, without a checkpoint of its own.
        crash.setattr(Checkpoints, "_write", lambda *_: None)
        crash.setenv("FAIL_AT", "2")  # Call 0 is the probe, 1 step 2, 2 step 3.
        assert detoxrl(["run", "--resume", "--run-dir", "run"]) == 2
    assert len(lines(place / "run", "metrics.jsonl")) == 3
    numbers, _ = tensorboard(place / "run")
    assert [step for step, _ in numbers["score/mean"]] == [
        0,
        1,
    ]  # A step that will be repeated is not shown before its checkpoint.
    assert detoxrl(["run", "--resume", "--run-dir", "run"]) == 0  # The run keeps its tracker.
    numbers, texts = tensorboard(place / "run")
    same(numbers, place / "run")
    result(numbers, place / "run")
    assert [*texts["config"]] == [0]
    kept = json.loads((place / "run/tracker.json").read_text())
    assert (kept["tracker"], kept["run"]) == ("tensorboard", begun["run"])
    assert detoxrl(["run", "--resume", "--run-dir", "run"]) == 0  # Nothing is new, so nothing is sent.
    assert tensorboard(place / "run") == (numbers, texts)
    for words in (["run", "--power", "0.2"], ["quickstart"]):
        assert detoxrl(["evaluate", *words, "--track", "tensorboard"]) == 2
    with monkeypatch.context() as gone:  # As if it were not installed.
        gone.setattr(stages, "resolve_tracker", lambda *_: pytest.fail("a report needs no tracker"))
        assert detoxrl(["report", "run"]) == 0
    assert detoxrl(["evaluate", "run"]) == 0  # The same numbers are not sent twice.
    assert tensorboard(place / "run") == (numbers, texts)
    untracked = place / "untracked"
    (place / "run").rename(untracked)
    for name in ("tensorboard", "tracker.json"):
        (untracked / name).rename(place / f"was-{name}")
    same_end(place / "whole", untracked)  # A tracker changes nothing in a run.


def test_training_that_starts_again_is_a_new_run_and_none_ends_tracking(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--rl.steps", "2"]
    assert detoxrl(own(*words, "--run-dir", "run", "--track", "tensorboard")) == 0
    first = json.loads((place / "run/tracker.json").read_text())
    assert detoxrl(["train", "run"]) == 0
    assert json.loads((place / "run/tracker.json").read_text())["run"] != first["run"]
    assert "removing tensorboard" in capfd.readouterr().err
    same(tensorboard(place / "run")[0], place / "run")
    assert detoxrl(["run", "--resume", "--run-dir", "run", "--track", "none"]) == 0
    assert not (place / "run/tracker.json").exists()
    before = contents(place / "run/tensorboard")
    assert detoxrl(["train", "run"]) == 0
    assert contents(place / "run/tensorboard") == before
    assert detoxrl(["train", "run", "--track", "tensorboard"]) == 0
    same(tensorboard(place / "run")[0], place / "run")
    assert detoxrl(own(*words, "--run-dir", "run", "--overwrite")) == 0
    assert not (place / "run/tensorboard").exists()  # The new run has no tracker.


def test_a_sweep_has_a_tracker_for_each_run_and_keeps_it(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", *own(*WORDS)[1:], "--run-dir", "all", "--over", "rl.kl-coef=0.1", "--track", "tensorboard"]
    assert detoxrl([*words, "--seeds", "0"]) == 0
    assert detoxrl(["sweep", "--resume", "--run-dir", "all", "--over", "rl.kl-coef=0.1", "--seeds", "0,1"]) == 0
    runs = [path for path in (place / "all").iterdir() if path.is_dir()]
    assert len(runs) == 2
    for run in runs:
        same(tensorboard(run)[0], run)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_written(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda module: None if module == name else find_spec(module))
    before = contents(place)
    for words in (own(), ["sweep", *own("--seeds", "0,1")[1:]]):
        assert detoxrl([*words, "--run-dir", "run", "--track", name]) == 2
        messages = capfd.readouterr().err.splitlines()
        assert len(messages) == 1
        assert f"--track = '{name}': is not installed; pip install 'detoxrl[track]'" in messages[0]
    assert contents(place) == before
    assert not (place / "run").exists()


def test_an_unknown_tracker_is_named_with_the_nearest_and_a_folder_is_not_a_package(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert detoxrl(own("--run-dir", "run", "--track", "tensorbord")) == 2
    assert "--track = 'tensorbord': is not a tracker; did you mean tensorboard?" in capfd.readouterr().err
    assert not (place / "run").exists()
    (place / "wandb").mkdir()  # As wandb writes its runs.
    monkeypatch.setattr(sys, "path", [str(place)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="is not installed"):
        resolve_tracker("wandb")


ALONE = """
import json, socket, sys
sys.path.insert(0, {tests!r})
asked = []

def told(event, given):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        asked.append((event, given[1:] or given))

sys.addaudithook(told)
from detoxrl import cli
for words in json.loads(sys.argv[1]):
    try:
        cli.main(words)
    except SystemExit as end:
        assert not end.code, end.code
heads = {{name.partition(".")[0] for name in sys.modules}}
print("HEARD", sorted(heads & {{"tensorboard", "tensorboardX", "trackio", "wandb", "gradio", "gradio_client"}}), asked)
"""


def alone(*commands: list[str], **environment: str) -> str:
    """Run commands in their own process; return its stdout, which ends with what it imported and contacted."""
    code = ALONE.format(tests=str(Path(__file__).parents[1]))
    surroundings = {**os.environ, "COLUMNS": "120", **environment}
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_without_the_flag_no_tracker_is_imported_and_nothing_is_contacted(place: Path) -> None:
    assert alone(own(*WORDS, "--run-dir", "run"), ["evaluate", "run"]).splitlines()[-1] == "HEARD [] []"


def test_trackio_shows_the_same_and_contacts_nothing(place: Path) -> None:
    words = own(*WORDS, "--rl.steps", "5", "--run-dir", "run", "--track", "trackio")
    printed = alone(words, TRACKIO_DIR=str(place / "shown"))
    assert printed.splitlines()[-1] == "HEARD ['gradio_client', 'trackio'] []"
    assert "Trackio" not in printed  # Its own messages are not results.
    with sqlite3.connect(place / "shown/detoxrl.db") as base:
        points = base.execute("select step, metrics from metrics order by id").fetchall()
        ((config,),) = base.execute("select config from configs").fetchall()
    shown: Series = defaultdict(list)
    tables: dict[str, list[dict[str, str]]] = {}
    for step, metrics in points:
        for name, value in json.loads(metrics).items():
            if isinstance(value, dict):
                tables[name] = value["_value"]
            else:
                shown[name].append((step, value))
    same(shown, place / "run")
    result(shown, place / "run")
    assert json.loads(config)["rl.steps"] == 5
    assert [len(tables[name]) for name in ("rollouts", "samples")] == [4, 8]


def wandb_records(path: Path) -> list[bytes]:
    """Return the records of a .wandb file, a LevelDB log: blocks of 32 KiB, a header of 7 bytes before each part."""
    data, place, records = path.read_bytes(), 7, [b""]
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        records[-1] += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # A whole record, or its last part.
            records.append(b"")
    return records[:-1]


def test_wandb_offline_shows_the_same_and_a_resumed_run_keeps_its_id(place: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    words = own(*WORDS, "--rl.steps", "5", "--run-dir", "run", "--track", "wandb")
    surroundings = {**os.environ, "WANDB_MODE": "offline"}
    surroundings |= {"WANDB_CACHE_DIR": str(place / "cache"), "WANDB_DATA_DIR": str(place / "data")}
    ended = forked(words, place, {**surroundings, "INTERRUPT_AT": "3"})
    assert ended.returncode == 130, ended.stderr
    ended = forked(["run", "--resume", "--run-dir", "run"], place, surroundings)
    assert ended.returncode == 0, ended.stderr
    assert "wandb" not in ended.stdout
    files = sorted((place / "run/wandb").glob("offline-run-*/*.wandb"))
    run = json.loads((place / "run/tracker.json").read_text())["run"]
    assert [path.name for path in files] == [f"run-{run}.wandb"] * 2
    shown: Series = defaultdict(list)
    tables, config = [], {}
    for path in files:
        for data in wandb_records(path):
            record = Record.FromString(data)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            values = {(*item.nested_key,): json.loads(item.value_json) for item in record.history.item}
            for (name, *part), value in values.items():
                if part == ["nrows"]:
                    tables.append((name, value))
                elif not part and name not in ("step", "_step", "_runtime", "_timestamp"):
                    shown[name].append((values[("step",)], value))
    same(shown, place / "run")
    result(shown, place / "run")
    assert config["rl.steps"] == 5
    assert ("samples", 8) in tables
    assert ("rollouts", 4) in tables


def test_wandb_without_a_login_is_one_line(place: Path) -> None:
    words = own(*WORDS, "--run-dir", "run", "--track", "wandb")
    hidden = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_API_KEY")}
    hidden |= {"HOME": str(place), "NETRC": str(place / "none")}
    ended = forked(words, place, hidden)
    assert ended.returncode == 2, ended.stderr
    assert "--track = 'wandb': " in ended.stderr.splitlines()[-1]
    assert "set WANDB_MODE=offline" in ended.stderr.splitlines()[-1]


def test_a_run_that_returns_to_an_older_checkpoint_sends_nothing_twice(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)  # A checkpoint at every step.
    words = own(*WORDS, "--rl.steps", "5")
    monkeypatch.setenv("INTERRUPT_AT", "4")
    assert detoxrl([*words, "--run-dir", "run", "--track", "tensorboard"]) == 130
    monkeypatch.delenv("INTERRUPT_AT")
    (place / "run/checkpoints/train/step-00000003/manifest.json").write_text("torn")
    assert detoxrl(["run", "--resume", "--run-dir", "run"]) == 0
    assert "is corrupted: " in capfd.readouterr().err
    numbers, _ = tensorboard(place / "run")
    assert [step for step, _ in numbers["score/mean"]] == [0, 1, 2, 3, 4]
