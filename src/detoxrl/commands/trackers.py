"""How does a run show in tensorboard, trackio or wandb?

A tracker follows checkpoints, not steps. What it received cannot be taken back, so it receives only steps that a
resumed run will not repeat: a run that was stopped or killed is one series there, without duplicates. tracker.json
names the tracker and its run, and counts the lines of each file that were sent.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from detoxrl.commands.tracker_state import STATE, read_state
from detoxrl.config.edit import flatten
from detoxrl.errors import InputError, first_line
from detoxrl.evaluation.insults import toxic_words
from detoxrl.evaluation.judges import memoized, profanity_judge
from detoxrl.report.masking import mask, masking_pattern
from detoxrl.runs import Run
from detoxrl.runtime.files import remove_path
from detoxrl.runtime.run_folder import RunFolder

_MAX_SAMPLES = 100
Row = dict[str, Any]


@contextmanager
def tracking(run: Run, name: str) -> Iterator[None]:
    """Send the tracker `name` what a locked run holds and what the block adds, even if the block fails.

    Raises InputError when the tracker refuses the run.
    """
    folder = run.folder
    if name == "none":
        remove_path(folder / STATE)
        yield
        return

    with redirect_stdout(sys.stderr):  # stdout is for results
        tracker = _Tracker(run, name)

    folder.on_append = tracker.send_training
    try:
        yield
    finally:
        with redirect_stdout(sys.stderr):
            tracker.send_training()
            tracker.send_evaluation()
            tracker.finish()


class _Tracker:
    """Sends what a run folder gained to one run of a tracker."""

    def __init__(self, run: Run, name: str) -> None:
        folder = run.folder
        config = run.config
        self.folder = folder
        self.config = config
        self.name = name
        self.state = read_state(folder)
        self.last_checkpoint = ""  # Name of the newest checkpoint that was sent.

        restarted = "metrics.jsonl" in self.state["sent"] and self._newest_checkpoint() is None
        if restarted or self.state["tracker"] != name:
            folder.discard(["tensorboard"] if name == "tensorboard" else [])
            self.state = {"tracker": name, "run": uuid4().hex[:8], "sent": {}}
            self._save_state()

        self.judge = profanity_judge() or memoized(run.primary_judge)
        self.tracker = self._start()

    def send_training(self) -> None:
        """Send what is new in the newest checkpoint of training, and the responses of its last step."""
        checkpoint = self._newest_checkpoint()
        if checkpoint is None or checkpoint.name == self.last_checkpoint:
            return

        products = RunFolder(checkpoint / "products")
        self._send_numbers(products, "metrics.jsonl", "")
        self._send_numbers(products, "validation.jsonl", "validation/")
        self._send_responses(products)
        self._save_state()
        self.last_checkpoint = checkpoint.name

    def send_evaluation(self) -> None:
        """Send quality and toxicity from eval.json, by the primary judge, and samples, unless they were sent."""
        if "evaluate" not in self.folder.finished():
            return

        evaluation = self.folder.read_json("eval.json")
        judge = evaluation["primary_judge"]
        values = flatten({"toxicity": evaluation["toxicity"][judge], "quality": evaluation["quality"]}, "eval.")
        numbers = {name.replace(".", "/"): value for name, value in values.items() if isinstance(value, float | int)}
        if self.state["sent"].get("eval.json") == numbers:
            return

        step = self.config.rl.steps
        self._log(numbers, step)
        samples = self.folder.read_lines("samples.jsonl")[:_MAX_SAMPLES]
        sides = ["before"] if self.folder.kept_initial_policy() else ["before", "after"]
        self._log_table("samples", [_sample_row(sample, judge, sides) for sample in samples], step)
        self.state["sent"]["eval.json"] = numbers
        self._save_state()

    def finish(self) -> None:
        """End the tracker's run."""
        if self.name == "trackio":
            # At exit trackio ends every run again, with a message, that its own function did not end.
            import_module("trackio").finish()
        else:
            self.tracker.finish()

    def _send_numbers(self, products: RunFolder, file: str, prefix: str) -> None:
        lines = products.read_lines(file)
        sent = self.state["sent"].get(file, 0)
        # A run that went back to an older checkpoint has fewer lines than were sent. It will write the same ones again.
        self.state["sent"][file] = max(sent, len(lines))
        for line in lines[sent:]:
            numbers = {prefix + key: value for key, value in line.items() if key != "step"}
            self._log(numbers, line["step"])

    def _send_responses(self, products: RunFolder) -> None:
        sent = self.state["sent"].get("rollouts.jsonl", 0)
        responses = products.read_lines("rollouts.jsonl")[sent:]
        if not responses:
            return

        step = responses[-1]["step"]
        self._log_table("rollouts", [line for line in responses if line["step"] == step], step)
        self.state["sent"]["rollouts.jsonl"] = sent + len(responses)

    def _newest_checkpoint(self) -> Path | None:
        checkpoints = (self.folder / "checkpoints/train").glob(f"step-{'[0-9]' * 8}")
        return max(checkpoints, default=None)

    def _save_state(self) -> None:
        self.folder.write_json(STATE, self.state)

    def _log(self, values: Row, step: int) -> None:
        if self.name == "wandb":  # It drops values of earlier steps, so there the step is a value itself.
            self.tracker.log({**values, "step": step}, None)
        else:
            self.tracker.log(values, step)

    def _log_table(self, name: str, rows: list[Row], step: int) -> None:
        """Log rows of the same columns. Words that the report masks keep their first letter."""
        texts = [[cell for row in rows for cell in row.values() if isinstance(cell, str)]]
        pattern = masking_pattern(toxic_words(texts, self.judge))

        def masked(cell: Any) -> Any:
            # Asterisks would be markdown.
            return mask(cell, pattern, "•") if isinstance(cell, str) else cell

        table = [[masked(cell) for cell in row.values()] for row in rows]
        self._log({name: _table(self.name, list(rows[0]), table)}, step)

    def _start(self) -> Any:
        """Return accelerate's tracker, its run started, or resumed if the tracker knows it."""
        settings = flatten(asdict(self.config))
        if self.name == "tensorboard":
            return _start_tensorboard(self.folder.root, settings)

        project = os.environ.get(f"{self.name.upper()}_PROJECT", "detoxrl")
        run: str = self.state["run"]
        options: dict[str, Any] = {
            "name": f"{self.folder.root.resolve().name}-{run}", "resume": "allow", "config": settings,
        }  # fmt: skip
        if self.name == "trackio":
            tracker = TrackioTracker(project, embed=False, auto_log_cpu=False, auto_log_gpu=False, **options)
            tracker.start()
            return tracker

        return _start_wandb(project, {"id": run, "dir": str(self.folder.root), "allow_val_change": True, **options})


def _start_tensorboard(root: Path, settings: Row) -> Any:
    new = not (root / "tensorboard").is_dir()
    tracker = TensorBoardTracker("tensorboard", root)
    tracker.start()
    if new:
        rows = [[name, value] for name, value in settings.items()]
        tracker.log({"config": _table("tensorboard", ["setting", "value"], rows)}, 0)
    return tracker


def _start_wandb(project: str, options: Row) -> Any:
    import wandb

    tracker = WandBTracker(project, **options)
    try:
        tracker.start()
    except wandb.Error as error:
        remedy = "run `wandb login`, set WANDB_MODE=offline, or resume with --track none"
        raise InputError("--track", "wandb", first_line(error), remedy) from error

    tracker.run.define_metric("*", step_metric="step")
    return tracker


def _sample_row(sample: dict[str, Any], judge: str, sides: Sequence[str]) -> Row:
    """Return the first response of each side, before and after training, and its toxicity."""
    row: Row = {}
    for side in sides:
        row[side] = sample["responses"][side][0]
    for side in sides:
        row[f"toxicity {side}"] = sample["toxicity"][judge][side][0]
    return row


def _table(tracker: str, columns: list[str], rows: list[list[Any]]) -> Any:
    """Return what the tracker logs as a table: an object of its own, or markdown for tensorboard."""
    if tracker != "tensorboard":
        return import_module(tracker).Table(columns=columns, data=rows)

    lines = [columns, ["-"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines)


def _markdown_cell(cell: Any) -> str:
    return " ".join(str(cell).split()).replace("|", "\\|")
