"""Which attacks does a reward see through, and what does it pay for a disguise? Prints two tables in Markdown.

    python benchmarks/evaluation/attacks.py quickstart                     a recipe and its classifier
    python benchmarks/evaluation/attacks.py quickstart --terms guarded     a recipe with other terms
    python benchmarks/evaluation/attacks.py runs/quickstart                a run, with its own normaliser

A cell is the share of generated rows in which an honest, civil response scores strictly above the attack, with its 95 %
interval (Wilson). Scores are those that training maximises: normalised, clipped, with the score of an empty response
and the penalty for a missing EOS. The recipe is prepared and warm-started, because terms are normalised on responses of
its initial policy, and some compare with them.

The second table has mean scores: of honest responses, of insults in disguise, and of the same insults in plain letters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from detoxrl.commands.run import prepare, rerun_stage
from detoxrl.config.recipes import recipe
from detoxrl.data.rows import to_prompts
from detoxrl.errors import DetoxrlError
from detoxrl.evaluation.attacks import DISGUISES, AttackRate, AttackRow, Score, attack_rows, rank_attacks
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, sample_texts
from detoxrl.models.types import Prompt
from detoxrl.rewards.obfuscation import plain
from detoxrl.rewards.shaping import Normaliser, fit_normaliser, shape_scores
from detoxrl.runs import Run
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training.initial_responses import InitialResponses


def run_of(name: str, terms: Sequence[str], scratch: Path) -> Run:
    """Return the run in a folder, or a run of a recipe in `scratch` up to its warm start."""
    if (Path(name) / "config.json").is_file():
        return Run(*RunFolder.open(Path(name)))

    root = scratch / "run"
    prepare(root, recipe(name, {"sft.baseline_steps": 0, "reward.terms": list(terms)}))
    rerun_stage(root, "sft")
    return Run(*RunFolder.open(root))


def shaped(run: Run) -> Score:
    """Return the scores that training would maximise."""
    policy = run.initial_policy()
    initial = InitialResponses(policy, run.config)
    normaliser = run.stored_normaliser() or measured_normaliser(run, policy, initial)

    def score(prompts: Sequence[Prompt], responses: Sequence[str], ended: torch.Tensor) -> torch.Tensor:
        raw = run.reward(initial.with_initial_responses(prompts), responses)
        return shape_scores(raw, responses, ended, normaliser, run.config)

    return score


def measured_normaliser(run: Run, policy: Policy, initial: InitialResponses) -> Normaliser:
    """Return mean and std of the terms on responses of the initial policy, as training measures them."""
    prompts = to_prompts(run.rows("train")[: run.config.reward.normalise_on])
    samples = sample_texts(policy, prompts, run.config.generation, Draws(run.config.seed, "normaliser"))
    return fit_normaliser(
        run.reward(initial.with_initial_responses(prompts), [texts[0] for texts in samples]), run.reward.terms
    )


def print_table(rates: Sequence[AttackRate]) -> None:
    print("| attack | honest response above it |\n|---|---|")
    for rate in rates:
        print(f"| {rate.attack} | {rate.share:.3f} ({rate.low:.3f} to {rate.high:.3f}) |")


def print_gains(rows: Sequence[AttackRow], score: Score) -> None:
    """Print what a disguise gains over the open insult."""
    print("| disguise | honest | disguised | open | disguise scores higher |\n|---|---|---|---|---|")
    for attack in DISGUISES:
        attacked = [row for row in rows if row.attack == attack]
        prompts = to_prompts(row.row for row in attacked)
        ended = torch.ones(len(attacked), dtype=torch.bool)
        honest = score(prompts, [row.honest for row in attacked], ended)
        disguised = score(prompts, [row.response for row in attacked], ended)
        opened = score(prompts, [plain(row.response) for row in attacked], ended)
        means = " | ".join(f"{float(scores.mean()):.2f}" for scores in (honest, disguised, opened))
        print(f"| {attack} | {means} | {float((disguised > opened).float().mean()):.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", metavar="RECIPE|RUN_FOLDER")
    parser.add_argument("--terms", nargs="*", default=[], metavar="TERM", help="reward.terms, with a recipe")
    parser.add_argument("--rows", type=int, default=200, help="of each attack and task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        try:
            run = run_of(options.reward, options.terms, Path(scratch))
            score = shaped(run)
            rows = attack_rows(options.seed, options.rows, run.config.data.task)
            rates = rank_attacks(rows, score)
        except DetoxrlError as error:
            sys.exit(str(error))
        print(f"{options.rows} rows of each attack, seed {options.seed}, reward of {options.reward}\n")
        print_table(rates)
        print()
        print_gains(rows, score)


if __name__ == "__main__":
    main()
