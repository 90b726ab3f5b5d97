"""How much memory and time does a recipe take on the real architecture? Random weights, no network.

    python benchmarks/speed/recipe_memory.py dialogsum --prompt-tokens 256 --out runs/memory

creates models of exactly the recipe's shapes (FLAN-T5, two RoBERTa-base), prompts of the given length and responses
that never end before the limit. It runs every stage of the recipe in one process (with --stages, then each in its own)
and prints the peak memory (VmHWM) and the seconds of each process.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from detoxrl.models.loading import save_base
from detoxrl.runtime.run_folder import STAGES

SHAPES = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
}
KNOWN = "Thank you , that is very kind of you . Summarize the following conversation Summary : You are a stupid idiot !"
_PEAK = """
import atexit, json, sys
def peak():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    with open(sys.argv[-1], "w") as out:
        json.dump(int(lines["VmHWM"].split()[0]) / 2**20, out)
atexit.register(peak)
from detoxrl.cli import main
main(sys.argv[1:-1])
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer with FLAN-T5's number of tokens, so that random ids decode to text."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    triples = [first + second + third for first in letters for second in letters for third in letters]
    vocabulary = ["<pad>", "</s>", "<unk>", *dict.fromkeys(KNOWN.split())]
    vocabulary += [f"{triple}o" for triple in triples[:17_000]]
    vocabulary += [f"{triple}an" for triple in triples[: 32_100 - len(vocabulary)]]

    model = models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>")
    word_level = Tokenizer(model)
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    word_level.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=word_level, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def save_t5(folder: Path, shape: dict[str, int]) -> None:
    """Write a FLAN-T5 of a shape with random weights."""
    config = T5Config(
        vocab_size=32128,
        d_kv=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        **shape,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    # A fresh T5's output layer is tied to its embeddings, FLAN-T5's is not. Its initial logits are so large that every
    # response would repeat one token.
    model.lm_head.weight = torch.nn.Parameter(0.02 * model.lm_head.weight.detach())
    save_base(model, tokenizer(), folder)


def save_classifier(folder: Path, labels: tuple[str, str], shape: dict[str, int]) -> None:
    """Write a RoBERTa classifier with random weights, of RoBERTa-base's shape where `shape` does not say otherwise."""
    config = RobertaConfig(
        max_position_embeddings=514,
        type_vocab_size=1,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        **shape,
    )
    # With another seed the labels of the random classifier may be reversed, which detoxrl refuses.
    torch.manual_seed(0)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def save_rows(folder: Path, prompt_tokens: int, rows: int) -> None:
    """Write dialogues of random words whose prompts have the given length, with summaries of 40 words."""
    word_level = tokenizer()
    words = list(word_level.get_vocab())[40:]
    template_tokens = len(word_level("Summarize the following conversation . Summary :").input_ids)
    draw = random.Random(0)
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.jsonl").open("w") as lines:
            for _ in range(rows):
                dialogue = " ".join(draw.choices(words, k=prompt_tokens - template_tokens))
                summary = " ".join(draw.choices(words, k=40))
                lines.write(json.dumps({"dialogue": dialogue, "summary": summary}) + "\n")


def run_measured(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command in its own process; return its peak memory in GiB and its seconds."""
    peak = folder / "peak.json"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", _PEAK, *command, str(peak)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(peak.read_text()), time.perf_counter() - started


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the flags that go to detoxrl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--size", choices=SHAPES, default="base")
    parser.add_argument("--rows", type=int, default=32, help="number of dialogues per split")
    parser.add_argument("--stages", action="store_true", help="also run each stage in its own process")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    return parser.parse_known_args()


def main() -> None:
    options, flags = arguments()
    out = options.out
    shutil.rmtree(out, ignore_errors=True)
    (out / "data").mkdir(parents=True)
    save_t5(out / "policy", SHAPES[options.size])
    save_classifier(out / "reward", ("nothate", "hate"), {})
    save_classifier(out / "judge", ("neutral", "toxic"), {})
    save_rows(out / "data", options.prompt_tokens, options.rows)

    settings = [
        options.recipe,
        *("--policy.base", str(out / "policy")),
        *("--reward.classifier", str(out / "reward")),
        *("--data.source", str(out / "data")),
        *("--data.max-length", "100000"),
        *("--evaluation.primary-judge", str(out / "judge")),
        *("--evaluation.prompts", "16"),
        *("--rl.validation-prompts", "16"),
        *flags,
    ]
    peak, seconds = run_measured(["run", *settings, "--run-dir", str(out / "whole")], out)
    by_stage = json.loads((out / "whole/seconds.json").read_text())
    print(f"run        {peak:5.2f} GiB  {seconds:6.1f} s  {by_stage}", flush=True)

    if options.stages:
        run = str(out / "apart")
        commands = [["prepare", *settings, "--run-dir", run]]
        commands += [[stage, run] for stage in STAGES[1:]]
        for command in commands:
            peak, seconds = run_measured(command, out)
            print(f"{command[0]:<10} {peak:5.2f} GiB  {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
