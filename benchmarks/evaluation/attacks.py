"""Which attacks does a reward see through, and what does it pay for a disguise? Prints two tables in Markdown.

    python benchmarks/evaluation/attacks.py quickstart          a recipe; a few seconds with the shipped classifier
    python benchmarks/evaluation/attacks.py runs/quickstart     the reward of a run, with its own normaliser

A cell is the share of generated rows in which an honest, civil response scores strictly above the attack, with its 95 %
interval (Wilson). Scores are those that training maximises: normalised, clipped, with the score of an empty response
and the penalty for a missing EOS. A recipe has no initial policy, so its normaliser is measured on the references of
generated rows, which the quickstart's initial policy imitates.

The second table has mean scores: of honest responses, of insults in disguise, and of the same insults in plain letters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from detoxrl.commands.prepare import reward_ingredients, train_embedded_reward
from detoxrl.config.edit import config_from_json
from detoxrl.config.recipes import recipe
from detoxrl.config.tasks import TASKS, TaskName
from detoxrl.data.embedded.corpus import generate_rows
from detoxrl.data.rows import to_prompts
from detoxrl.errors import DetoxrlError
from detoxrl.evaluation.attacks import ATTACKS, DISGUISES, AttackRate, AttackRow, Score, attack_rows, rank_attacks
from detoxrl.models.types import Prompt
from detoxrl.rewards.obfuscation import plain
from detoxrl.rewards.shaping import Normaliser, fit_normaliser, shape_scores
from detoxrl.runs import Run
from detoxrl.runtime.cache import cached
from detoxrl.runtime.run_folder import RunFolder


def run_of(name: str, scratch: Path) -> Run:
    """Return the run in a folder, or a run of a recipe in `scratch` with its embedded classifier, if it has one."""
    if (Path(name) / "config.json").is_file():
        return Run(RunFolder(Path(name)), config_from_json(Path(name) / "config.json"))

    run = Run(RunFolder(scratch), recipe(name))
    if run.uses_embedded_reward:
        seed, encoder = run.config.seed, run.config.reward.encoder
        build = partial(train_embedded_reward, seed, encoder, scratch / "checkpoints")
        cached("reward", reward_ingredients(seed, encoder), run.folder / "reward", build)
    return run


def normaliser_of(run: Run) -> Normaliser:
    """Return the normaliser of a run, or one measured on references of generated rows of its task."""
    if (run.folder / "normaliser.json").is_file():
        return Normaliser(**run.folder.read_json("normaliser.json"))
    if run.config.reward.normalise_on == 0:
        return Normaliser()
    rows = generate_rows(run.config.seed, {"train": run.config.reward.normalise_on}, run.config.data.task)["train"]
    return fit_normaliser(run.reward(to_prompts(rows), [row.references[0] for row in rows]))


def shaped(run: Run) -> Score:
    """Return the scores that training would maximise."""
    normaliser = normaliser_of(run)

    def score(prompts: Sequence[Prompt], responses: Sequence[str], ended: torch.Tensor) -> torch.Tensor:
        raw = run.reward(prompts, responses)
        return shape_scores(raw, responses, ended, normaliser, run.config)

    return score


def print_table(rates: dict[TaskName, list[AttackRate]]) -> None:
    print("| attack | " + " | ".join(rates) + " |")
    print("|---|" + "---|" * len(rates))
    for attack in ATTACKS:
        cells = []
        for of_task in rates.values():
            found = [rate for rate in of_task if rate.attack == attack]
            cells += [f"{rate.share:.3f} ({rate.low:.3f} to {rate.high:.3f})" for rate in found] or [""]
        print(f"| {attack} | " + " | ".join(cells) + " |")


def print_gains(rows: dict[TaskName, list[AttackRow]], score: Score) -> None:
    """Print what a disguise gains over the open insult."""
    print("| disguise | honest | disguised | open | disguise scores higher |\n|---|---|---|---|---|")
    for task, of_task in rows.items():
        for attack in DISGUISES:
            attacked = [row for row in of_task if row.attack == attack]
            prompts = to_prompts(row.row for row in attacked)
            ended = torch.ones(len(attacked), dtype=torch.bool)
            honest = score(prompts, [row.honest for row in attacked], ended)
            disguised = score(prompts, [row.response for row in attacked], ended)
            opened = score(prompts, [plain(row.response) for row in attacked], ended)
            means = " | ".join(f"{float(scores.mean()):.2f}" for scores in (honest, disguised, opened))
            print(f"| {attack}, {task} | {means} | {float((disguised > opened).float().mean()):.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", metavar="RECIPE|RUN_FOLDER")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["summarize", "chat"], metavar="TASK")
    parser.add_argument("--rows", type=int, default=200, help="of each attack and task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        try:
            run = run_of(options.reward, Path(scratch))
            score = shaped(run)
            rows = {task: attack_rows(options.seed, options.rows, task) for task in options.tasks}
            rates = {task: rank_attacks(of_task, score) for task, of_task in rows.items()}
        except DetoxrlError as error:
            sys.exit(str(error))
    print(f"{options.rows} rows of each attack, seed {options.seed}, reward of {options.reward}\n")
    print_table(rates)
    print()
    print_gains(rows, score)


if __name__ == "__main__":
    main()
