"""Does RL rewrite rude sentences better than the supervised model that it starts from? Keeps the results of 3 seeds.

    python benchmarks/real_data/paradetox.py PAIRS MODEL ENCODER

PAIRS is a file of ParaDetox, MODEL a folder or hub id of SmolLM2-135M-Instruct, ENCODER one of a sentence encoder.
First `detoxrl fit` makes a scorer of the pairs, and a classifier of fluent sentences. The reward is the scorer and
character n-grams in common with the source; what measures civility, similarity and fluency has no part in it. The model
is fine-tuned on the pairs once, by the run of seed 0; every seed then trains it by RL, and "before" is the fine-tuned
model. Copies of the sources, deleted words and the rewrites of people are measured beside it.

Everything is made in --out, and what is finished there is not made again, so the same command goes on after a stop. The
results, without any text of the set, go to docs/results/paradetox.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import detoxrl
import fluency
from detoxrl.config.schema import Config
from detoxrl.errors import DetoxrlError
from kept_results import RESULTS, fitted, how_to_go_on, keep_run
from realtoxicity import SCORER

PLACE = RESULTS / "paradetox"
SEEDS = (0, 1, 2)
CIVIL = "en_neutral_comment"
SFT_STEPS = 750
"""One pass over 12,000 pairs."""
TRAINING: dict[str, Any] = {
    "policy.lora_rank": 16,
    "policy.lora_alpha": 16,
    "sft.baseline_steps": 0,
    "generation.batch_size": 64,
    "rl.algorithm": "rloo",
    "rl.batch_size": 64,
    "rl.steps": 60,
    "rl.lr": 3e-4,
    "rl.kl_coef": 0.05,
    "rl.validate_every": 10,
}
MEASURING: dict[str, Any] = {
    "evaluation.primary_judge": "perspective-minilm",
    "evaluation.other_judges": ["alt-profanity-check"],
    "evaluation.prompts": 400,
}


def config_of(pairs: str, model: str, encoder: str, folder: Path, settings: dict[str, Any]) -> Config:
    """Return the config of a run whose scorer and classifier of fluent sentences are in a folder."""
    scorer = str((folder / "scorer").resolve())
    return detoxrl.recipe(
        "paradetox",
        {
            "policy.base": model,
            "data.source": pairs,
            "reward.classifier": scorer,
            "reward.good_label": "score",
            "reward.toxic_label": None,
            "reward.terms": ["classifier", "source_similarity,weight=0.5"],
            "evaluation.encoder": encoder,
            "evaluation.fluency": f"{(folder / 'fluency').resolve()}=fluent",
            **TRAINING,
            **MEASURING,
            **settings,
        },
    )


def of_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Return the settings in which a seed's run differs: the first one fine-tunes, the others start from its LoRA."""
    if seed == SEEDS[0]:
        return {"seed": seed, "sft.steps": SFT_STEPS}
    start = folder / f"seed{SEEDS[0]}" / "start"
    return {"seed": seed, "sft.steps": 0, "policy.adapter": str(start.resolve())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", metavar="PAIRS")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("encoder", metavar="ENCODER")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/paradetox"))
    options = parser.parse_args()

    try:
        fitted(options.pairs, options.out / "scorer", SCORER)
        sentences = options.out / "sentences.jsonl"
        if not sentences.is_file():
            fluency.write_sentences(options.pairs, CIVIL, sentences)
        fitted(str(sentences), options.out / "fluency", fluency.SETTINGS)

        for seed in options.seeds:
            settings = of_seed(seed, options.out)
            config = config_of(options.pairs, options.model, options.encoder, options.out, settings)
            folder = options.out / f"seed{seed}"
            detoxrl.run(folder, config, if_exists=how_to_go_on(folder))
            keep_run(folder, PLACE / folder.name)
    except DetoxrlError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
