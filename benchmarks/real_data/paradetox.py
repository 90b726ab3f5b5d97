"""Does RL rewrite rude sentences better than the supervised model that it starts from? Keeps the results of 3 seeds.

    python benchmarks/real_data/paradetox.py PAIRS MODEL ENCODER

PAIRS is a file of ParaDetox, MODEL a folder or hub id of SmolLM2-135M-Instruct, ENCODER one of a sentence encoder.
First the pairs are split, once for all seeds, and `detoxrl fit` makes of the training part a scorer of pairs, and a
classifier of fluent sentences: nothing before the measurement reads a sentence that is measured, or a near-duplicate.
The reward is the scorer and character n-grams in common with the source; what measures civility, similarity and
fluency has no part in it. The model is fine-tuned on the pairs once, by the run of seed 0; every seed then trains it by
RL, and "before" is the fine-tuned model. Copies of the sources, deleted words and the rewrites of people are measured
beside it, and in the first run the best of 4 and the temperature of equal entropy.

Everything is made in --out, and what is finished there is not made again, so the same command goes on after a stop. The
results, without any text of the set, go to docs/results/paradetox.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detoxrl
import fluency
from detoxrl.config.schema import Config
from detoxrl.data.duplicates import near_duplicate_groups
from detoxrl.data.files import Record, read_records, text_of
from detoxrl.errors import DetoxrlError
from detoxrl.runtime.files import replace_folder
from kept_results import RESULTS, fitted, how_to_go_on, keep_run
from realtoxicity import SCORER

PLACE = RESULTS / "paradetox"
SEEDS = (0, 1, 2)
RUDE = "en_toxic_comment"
CIVIL = "en_neutral_comment"
HELD_OUT = {"test": 400, "validation": 256}
"""How many sources these splits have; the others are for training."""
SFT_STEPS = 750
"""One pass over 12,000 pairs."""
TRAINING: dict[str, Any] = {
    "policy.lora_rank": 16,
    "policy.lora_alpha": 16,
    "sft.baseline_steps": 0,
    "generation.batch_size": 64,
    "rl.algorithm": "rloo",
    "rl.batch_size": 64,
    "rl.steps": 40,
    "rl.lr": 3e-4,
    "rl.kl_coef": 0.05,
    "rl.validate_every": 10,
    "rl.validation_prompts": HELD_OUT["validation"],
}
MEASURING: dict[str, Any] = {
    "evaluation.primary_judge": "perspective-minilm",
    "evaluation.other_judges": ["alt-profanity-check"],
    "evaluation.prompts": HELD_OUT["test"],
}


def write_splits(pairs: str, folder: Path) -> None:
    """Write the pairs into a file for each split; near-duplicate sources, and all rewrites of one, are in the same.

    Raises InputError for pairs that cannot be read.
    """
    records = read_records(Path(pairs), "PAIRS")
    with replace_folder(folder) as made:
        for split, of_split in _splits(records):
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in of_split)
            (made / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def _splits(records: list[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Yield each split and its records."""
    sources = [text_of(record, RUDE, "PAIRS", f"row {number}") for number, record in enumerate(records, start=1)]
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(near_duplicate_groups(sources)):
        groups.setdefault(group, []).append(row)

    order = list(groups)
    random.Random("paradetox").shuffle(order)
    for split, size in HELD_OUT.items():
        rows: list[int] = []
        while len({sources[row] for row in rows}) < size:
            rows += groups[order.pop()]
        yield split, [records[row] for row in rows]
    yield "train", [records[row] for group in order for row in groups[group]]


def config_of(pairs: str, model: str, encoder: str, folder: Path, settings: dict[str, Any]) -> Config:
    """Return the config of a run whose scorer and classifier of fluent sentences are in a folder."""
    scorer = str((folder / "scorer").resolve())
    return detoxrl.recipe(
        "paradetox",
        {
            "policy.base": model,
            "data.source": pairs,
            # After 12,000 pairs the model needs no instructions, and those of its chat template are most of a prompt.
            "data.chat_template": False,
            "data.template": "Rude: {source}\nPolite:",
            "reward.classifier": scorer,
            "reward.good_label": "score",
            "reward.toxic_label": None,
            "reward.terms": ["classifier", "source_similarity,weight=0.25"],
            "evaluation.encoder": encoder,
            "evaluation.fluency": f"{(folder / 'fluency').resolve()}=fluent",
            **TRAINING,
            **MEASURING,
            **settings,
        },
    )


def of_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Return the settings in which a seed's run differs: the first one fine-tunes, the others start from its LoRA.

    The others also leave out the baselines that sample, which are half of the samples.
    """
    if seed == SEEDS[0]:
        return {"seed": seed, "sft.steps": SFT_STEPS}
    start = folder / f"seed{SEEDS[0]}" / "start"
    return {
        "seed": seed,
        "sft.steps": 0,
        "policy.adapter": str(start.resolve()),
        "evaluation.best_of": [],
        "evaluation.sharpened": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", metavar="PAIRS")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("encoder", metavar="ENCODER")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("runs/paradetox"))
    options = parser.parse_args()

    try:
        pairs = options.out / "pairs"
        if not pairs.is_dir():
            write_splits(options.pairs, pairs)
        training = str(pairs / "train.jsonl")
        fitted(training, options.out / "scorer", SCORER)
        sentences = options.out / "sentences.jsonl"
        if not sentences.is_file():
            fluency.write_sentences(training, CIVIL, sentences)
        fitted(str(sentences), options.out / "fluency", fluency.SETTINGS)

        for seed in options.seeds:
            settings = of_seed(seed, options.out)
            config = config_of(str(pairs), options.model, options.encoder, options.out, settings)
            folder = options.out / f"seed{seed}"
            detoxrl.run(folder, config, if_exists=how_to_go_on(folder))
            keep_run(folder, PLACE / folder.name)
    except DetoxrlError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
