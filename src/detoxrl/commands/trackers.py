"""How does a run show in tensorboard, trackio or wandb?

A tracker follows checkpoints, not steps: what it got is never taken back, so a run that was stopped, by force too, is
one series there, and no step twice. tracker.json says which tracker, its run, and how many lines of each file it has.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from detoxrl.config.edit import closest_match, flatten
from detoxrl.config.schema import Config
from detoxrl.errors import InputError, first_line, require
from detoxrl.evaluation.compare import toxic_words
from detoxrl.evaluation.judges import profanity_judge
from detoxrl.report.page import mask_pattern
from detoxrl.runs import judges_of
from detoxrl.runtime.files import remove_path
from detoxrl.runtime.run_folder import RunFolder

_FILE, _NAMES, _SAMPLES = "tracker.json", ("none", "tensorboard", "trackio", "wandb"), 100


def chosen(asked: str | None, root: Path | None = None) -> str:
    """Return the tracker asked for, or that of the run in `root`, or "none"; imports none to know.

    Raises InputError when there is no such tracker or it is not installed.
    """
    name = asked or (_kept(RunFolder(root))["tracker"] if root else "none")
    require(
        name in _NAMES, "--track", name, "is no tracker", closest_match(name, _NAMES, f"say one of {', '.join(_NAMES)}")
    )
    spec = util.find_spec(name)  # a folder of that name, such as wandb's own, passes for a package, without an origin
    there = name == "none" or (spec is not None and spec.origin is not None)
    require(there, "--track", name, "is not installed", "pip install 'detoxrl[track]'")
    return name


@contextmanager
def followed(folder: RunFolder, config: Config, name: str) -> Iterator[None]:
    """Let a tracker have what a held run has and what is made inside, however that ends.

    Raises InputError when the tracker does not take the run.
    """
    if name == "none":
        remove_path(folder / _FILE)
        yield
        return
    with redirect_stdout(sys.stderr):  # stdout carries results
        tracker = _Tracker(folder, config, name)
    folder.on_append = tracker.follow
    try:
        yield
    finally:
        with redirect_stdout(sys.stderr):
            tracker.follow()
            tracker.follow_result()
            tracker.end()


class _Tracker:
    def __init__(self, folder: RunFolder, config: Config, name: str) -> None:
        self.folder, self.config, self.name, self.kept, self.seen = folder, config, name, _kept(folder), ""
        again = "metrics.jsonl" in self.kept["sent"] and not self._newest()  # training began anew: another run
        if again or self.kept["tracker"] != name:
            folder.discard(["tensorboard"] if name == "tensorboard" else [])
            self.kept = {"tracker": name, "run": uuid4().hex[:8], "sent": {}}
            folder.write_json(_FILE, self.kept)
        self.judge = profanity_judge() or next(iter(judges_of(config).values()))
        self.run = _opened(folder.root, name, self.kept["run"], flatten(asdict(config)))
        # At exit trackio ends, and says so, once more what it did not end itself.
        self.end = import_module(name).finish if name == "trackio" else self.run.finish

    def follow(self) -> None:
        """Send what the newest checkpoint of training holds and was not sent yet, with responses of its last step."""
        if (place := self._newest()) is None or place.name == self.seen:
            return
        products, sent = RunFolder(place / "products"), self.kept["sent"]
        for file, prefix in (("metrics.jsonl", ""), ("validation.jsonl", "validation/")):
            lines, had = products.read_lines(file), sent.get(file, 0)
            sent[file] = max(had, len(lines))  # fewer after an older checkpoint had to do: they come again
            for line in lines[had:]:
                self._log({prefix + key: value for key, value in line.items() if key != "step"}, line["step"])
        if responses := products.read_lines("rollouts.jsonl")[sent.get("rollouts.jsonl", 0) :]:
            step = responses[-1]["step"]
            self._show("rollouts", [line for line in responses if line["step"] == step], step)
            sent["rollouts.jsonl"] = sent.get("rollouts.jsonl", 0) + len(responses)
        self.folder.write_json(_FILE, self.kept)
        self.seen = place.name

    def follow_result(self) -> None:
        """Send what eval.json says of quality and by the primary judge, and samples, unless that was sent."""
        folder, sent, sides = self.folder, self.kept["sent"], ("before", "after")
        if "evaluate" not in folder.finished():
            return
        found, step = folder.read_json("eval.json"), self.config.rl.steps
        judge, lines = found["primary_judge"], folder.read_lines("samples.jsonl")[:_SAMPLES]
        numbers = flatten({"toxicity": found["toxicity"][judge], "quality": found["quality"]}, "eval.")
        numbers = {k.replace(".", "/"): v for k, v in numbers.items() if isinstance(v, float | int)}
        if sent.get("eval.json") == numbers:
            return
        self._log(numbers, step)
        rates = [{f"toxicity {side}": line["toxicity"][judge][side][0] for side in sides} for line in lines]
        texts = [{side: line["responses"][side][0] for side in sides} for line in lines]
        self._show("samples", [text | rate for text, rate in zip(texts, rates, strict=True)], step)
        sent["eval.json"] = numbers
        folder.write_json(_FILE, self.kept)

    def _newest(self) -> Path | None:
        return max((self.folder / "checkpoints/train").glob(f"step-{'[0-9]' * 8}"), default=None)

    def _log(self, values: dict[str, Any], step: int) -> None:
        own = self.name == "wandb"  # it drops what comes for an earlier step, so the axis is a value there
        self.run.log(values | ({"step": step} if own else {}), None if own else step)

    def _show(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Log a table; of what the report masks it has the first letter alone, and dots, as asterisks are markdown."""
        texts = [[cell for row in rows for cell in row.values() if isinstance(cell, str)]]
        hide = partial(mask_pattern(toxic_words(texts, self.judge)).sub, lambda m: m[0][0] + "•" * (len(m[0]) - 1))
        table = [[hide(cell) if isinstance(cell, str) else cell for cell in row.values()] for row in rows]
        self._log({name: _table(self.name, [*rows[0]], table)}, step)


def _kept(folder: RunFolder) -> dict[str, Any]:
    return dict(folder.read_json(_FILE)) if (folder / _FILE).is_file() else {"tracker": "none", "sent": {}}


def _table(tracker: str, columns: list[str], rows: list[list[Any]]) -> Any:
    if tracker != "tensorboard":
        return import_module(tracker).Table(columns=columns, data=rows)
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], ["-"] * len(columns), *cells[1:]))


def _opened(root: Path, name: str, run: str, settings: dict[str, Any]) -> Any:
    """Return accelerate's tracker of this name with the run begun, or gone on with where it knows the run."""
    if name == "tensorboard":
        begun, tracker = (root / name).is_dir(), TensorBoardTracker(name, root)
        tracker.start()
        if not begun:
            tracker.log({"config": _table(name, ["setting", "value"], [[*pair] for pair in settings.items()])}, 0)
        return tracker
    project = os.environ.get(f"{name.upper()}_PROJECT", "detoxrl")
    how: dict[str, Any] = {"name": f"{root.resolve().name}-{run}", "resume": "allow", "config": settings}
    if name == "trackio":
        tracker = TrackioTracker(project, embed=False, auto_log_cpu=False, auto_log_gpu=False, **how)
        tracker.start()
        return tracker
    import wandb

    tracker = WandBTracker(project, id=run, dir=str(root), allow_val_change=True, **how)
    try:
        tracker.start()
    except wandb.Error as error:
        remedy = "say `wandb login`, set WANDB_MODE=offline, or go on with --resume --track none"
        raise InputError("--track", name, first_line(error), remedy) from error
    tracker.run.define_metric("*", step_metric="step")
    return tracker
