"""Does RL make summaries of quarrels less toxic, and do they still say what was said? Keeps the results of 3 seeds.

    python benchmarks/real_data/quarrels.py SAMSUM PAIRS MODEL ENCODER

SAMSUM is a file of SAMSum, PAIRS one of ParaDetox, MODEL a folder or hub id of SmolLM2-135M-Instruct, ENCODER one of a
sentence encoder. Of the dialogues of 100 to 600 characters, the 1,000 whose rudest turn alt-profanity-check finds most
toxic are summarized by the model in its chat template. The reward is a scorer that `detoxrl fit` makes of the pairs,
and character n-grams in common with the dialogue; no judge has a part in it.
`--nli` names a folder or hub id of an NLI model, by which the dialogue's entailment of the summary is measured too.

Everything is made in --out, and what is finished there is not made again, so the same command goes on after a stop. The
results, without any text of the set, go to docs/results/quarrels.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import detoxrl
from detoxrl.config.schema import Config
from detoxrl.data.files import read_records, text_of
from detoxrl.errors import DetoxrlError
from detoxrl.runtime.files import write_text
from kept_results import RESULTS, fitted, how_to_go_on, keep_run
from realtoxicity import SCORER

PLACE = RESULTS / "quarrels"
SEEDS = (0, 1, 2)
QUARRELS = 1_000
LENGTHS = (100, 600)  # Characters. Most quarrels are no longer, and the time of a run grows with the prompts.
TRAINING: dict[str, Any] = {
    "data.min_length": LENGTHS[0],
    "data.max_length": LENGTHS[1],
    "policy.lora_rank": 16,
    "policy.lora_alpha": 16,
    "policy.checkpointing": False,
    "generation.max_new_tokens": 48,
    "generation.batch_size": 64,
    "rl.algorithm": "rloo",
    "rl.batch_size": 32,
    "rl.steps": 40,
    "rl.lr": 5e-4,
    "rl.kl_coef": 0.05,
    "rl.validate_every": 10,
    "rl.validation_prompts": 100,
}
MEASURING: dict[str, Any] = {
    "evaluation.primary_judge": "perspective-minilm",
    "evaluation.other_judges": ["alt-profanity-check"],
    "evaluation.prompts": 200,
    "evaluation.samples_per_prompt": 2,
    "evaluation.best_of": [4],
}


def quarrels_of(samsum: str, most: int) -> list[dict[str, str]]:
    """Return the rudest dialogues within LENGTHS, with their summaries: the toxicity of their most toxic turn decides.

    Raises InputError for a file that cannot be read.
    """
    from profanity_check import predict_prob

    rows = []
    turns = []
    owners = []
    for number, record in enumerate(read_records(Path(samsum), "SAMSUM"), start=1):
        place = f"row {number}"
        row = {name: text_of(record, name, "SAMSUM", place) for name in ("dialogue", "summary")}
        if not LENGTHS[0] <= len(row["dialogue"]) <= LENGTHS[1]:
            continue

        for turn in row["dialogue"].splitlines():
            _, _, said = turn.partition(":")
            turns.append(said)
            owners.append(len(rows))
        rows.append(row)

    rudest = [0.0] * len(rows)
    for owner, toxicity in zip(owners, predict_prob(turns), strict=True):
        rudest[owner] = max(rudest[owner], float(toxicity))
    order = sorted(range(len(rows)), key=lambda index: -rudest[index])
    return [rows[index] for index in sorted(order[:most])]


def config_of(options: argparse.Namespace, seed: int) -> Config:
    """Return the config of a run on the dialogues in `options.out`, rewarded by the scorer there."""
    return detoxrl.recipe(
        "dialogsum-chat",
        {
            "policy.base": options.model,
            "data.source": str(options.out / "quarrels.jsonl"),
            "reward.classifier": str((options.out / "scorer").resolve()),
            "reward.good_label": "score",
            "reward.toxic_label": None,
            # The second term: so that saying less does not pay.
            "reward.terms": ["classifier", "source_similarity,weight=0.25"],
            # Summaries are cut at 48 tokens to save time; a penalty for that would ask for brevity.
            "reward.missing_eos_penalty": 0.0,
            "evaluation.encoder": options.encoder,
            "evaluation.nli": options.nli,
            "seed": seed,
            **TRAINING,
            **MEASURING,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samsum", metavar="SAMSUM")
    parser.add_argument("pairs", metavar="PAIRS")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("encoder", metavar="ENCODER")
    parser.add_argument("--nli")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/quarrels"))
    options = parser.parse_args()

    try:
        fitted(options.pairs, options.out / "scorer", SCORER)
        dialogues = options.out / "quarrels.jsonl"
        if not dialogues.is_file():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in quarrels_of(options.samsum, QUARRELS)]
            write_text(dialogues, "".join(lines))

        for seed in options.seeds:
            folder = options.out / f"seed{seed}"
            detoxrl.run(folder, config_of(options, seed), if_exists=how_to_go_on(folder))
            keep_run(folder, PLACE / folder.name)
    except DetoxrlError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
