"""Does RL make a model continue RealToxicityPrompts less toxically, and at what price? Keeps the results of 3 seeds.

    python benchmarks/real_data/realtoxicity.py PROMPTS PAIRS MODEL

PROMPTS are rows of RealToxicityPrompts and PAIRS those of ParaDetox: files, or allenai/real-toxicity-prompts and
s-nlp/paradetox of the hub. MODEL is a folder or hub id of SmolLM2-135M. First `detoxrl fit` makes the reward, a scorer
of the pairs; no judge of the results has a part in it. (One of them, perspective-minilm, was fitted to Perspective's
scores of this set: to the prompts and to what people wrote, not to what a model writes.) Then come the runs, of which
the first also measures the baselines, and a sweep over the weight of the KL penalty.

Everything is made in --out, and what is finished there is not made again, so the same command goes on after a stop. The
results, without any text of the sets, go to docs/results/realtoxicity.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import detoxrl
from detoxrl.commands.sweep import sweep
from detoxrl.commands.sweep_plan import SweepPlan
from detoxrl.config.schema import Config
from detoxrl.errors import DetoxrlError
from kept_results import RESULTS, fitted, how_to_go_on, keep_run, keep_sweep

PLACE = RESULTS / "realtoxicity"
SEEDS = (0, 1, 2)
SWEEP = SweepPlan(over=("rl.kl-coef=0.005,0.02,0.08,0.32",))
SCORER: dict[str, Any] = {
    "chosen_column": "en_neutral_comment",
    "rejected_column": "en_toxic_comment",
    "epochs": 1,
    "max_length": 64,
}
# What the first run measures beside the trained policy. The others say how far another seed is, sampled plainly.
BASELINES: dict[str, Any] = {"sft.baseline_steps": 100, "evaluation.best_of": [4], "evaluation.best_of_samples": 25}
NO_BASELINES: dict[str, Any] = {
    "sft.baseline_steps": 0,
    "evaluation.best_of": [],
    "evaluation.sharpened": False,
    "evaluation.top_p": None,
}
# The sweep asks for a curve, not for a protocol: a third of the steps, a tenth of the samples.
BRIEFLY: dict[str, Any] = {
    **NO_BASELINES,
    "rl.steps": 20,
    "rl.validate_every": 20,
    "rl.validation_prompts": 100,
    # The last policy counts, whatever its quality: that is what the curve is about.
    "rl.quality_margin": 1.0,
    "evaluation.prompts": 200,
    "evaluation.samples_per_prompt": 5,
}


def config_of(prompts: str, model: str, scorer: Path, settings: dict[str, Any]) -> Config:
    """Return the config of a run that is rewarded by the scorer."""
    return detoxrl.recipe(
        "realtoxicity",
        {
            "policy.base": model,
            "data.source": prompts,
            "reward.classifier": str(scorer),
            "reward.good_label": "score",
            "reward.toxic_label": None,
            "evaluation.primary_judge": "perspective-minilm",
            "evaluation.other_judges": ["alt-profanity-check"],
            **settings,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", metavar="PROMPTS")
    parser.add_argument("pairs", metavar="PAIRS")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/realtoxicity"))
    options = parser.parse_args()

    try:
        scorer = fitted(options.pairs, options.out / "scorer", SCORER)
        for seed in options.seeds:
            settings = {"seed": seed, **(BASELINES if seed == SEEDS[0] else NO_BASELINES)}
            config = config_of(options.prompts, options.model, scorer, settings)
            folder = options.out / f"seed{seed}"
            detoxrl.run(folder, config, if_exists=how_to_go_on(folder))
            keep_run(folder, PLACE / folder.name)

        if not options.no_sweep:
            config = config_of(options.prompts, options.model, scorer, BRIEFLY)
            folder = options.out / "sweep"
            sweep(folder, config, SWEEP, how_to_go_on(folder))
            keep_sweep(folder, PLACE / folder.name)
    except DetoxrlError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
