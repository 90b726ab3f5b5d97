"""How much memory and time does a recipe take on the real architecture? Random weights, no network.

    python benchmarks/recipe_memory.py dialogsum --prompt-tokens 256 --out runs/memory

makes models of the recipe's very shapes (FLAN-T5, two RoBERTa-base), prompts of the given length and responses that
never end before the limit, then runs every stage of the recipe in one process, and again each in its own, and prints
the peak of each one's memory (VmHWM, as the kernel counts it) and its seconds.
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
    """A word-level tokenizer with as many words as FLAN-T5 knows tokens, so that random ids decode to text."""
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(KNOWN.split())]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words += [a + b + c + "o" for a in letters for b in letters for c in letters][:17_000]
    words += [a + b + c + "an" for a in letters for b in letters for c in letters][: 32_100 - len(words)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_parts(place: Path, size: str, prompt_tokens: int, rows: int) -> None:
    """Write the policy's base, two classifiers and the dialogues."""
    words = tokenizer()
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=32128, d_kv=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                  decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **SHAPES[size])  # fmt: skip
    model = T5ForConditionalGeneration(t5)
    with (
        torch.no_grad()
    ):  # as they are made, logits are so large that every response would be one token again and again
        model.lm_head.weight *= 0.02
    save_base(model, words, place / "policy")
    for name, labels in {"reward": ("nothate", "hate"), "judge": ("neutral", "toxic")}.items():
        roberta = RobertaConfig(max_position_embeddings=514, type_vocab_size=1, id2label=dict(enumerate(labels)),
                                label2id={label: i for i, label in enumerate(labels)})  # fmt: skip
        RobertaForSequenceClassification(roberta).save_pretrained(place / name)
        words.save_pretrained(place / name)
    draw, vocabulary = random.Random(0), list(words.get_vocab())[40:]
    frame = len(words("Summarize the following conversation . Summary :").input_ids)
    for split, count in {"train": rows, "validation": rows, "test": rows}.items():
        with (place / "data" / f"{split}.jsonl").open("w") as lines:
            for _ in range(count):
                dialogue = " ".join(draw.choices(vocabulary, k=prompt_tokens - frame))
                summary = " ".join(draw.choices(vocabulary, k=40))
                lines.write(json.dumps({"dialogue": dialogue, "summary": summary}) + "\n")


def measured(words: list[str], place: Path) -> tuple[float, float]:
    """Run a command in its own process; return its peak memory in GiB and its seconds."""
    found, started = place / "peak.json", time.perf_counter()
    subprocess.run([sys.executable, "-c", _PEAK, *words, str(found)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(found.read_text()), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--size", choices=SHAPES, default="base")
    parser.add_argument("--rows", type=int, default=32, help="dialogues of each split")
    parser.add_argument("--stages", action="store_true", help="each stage in a process of its own too")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    options, flags = parser.parse_known_args()
    shutil.rmtree(options.out, ignore_errors=True)
    (options.out / "data").mkdir(parents=True)
    make_parts(options.out, options.size, options.prompt_tokens, options.rows)
    own = ["--policy.base", options.out / "policy", "--reward.classifier", options.out / "reward", "--data.source",
           options.out / "data", "--evaluation.primary-judge", options.out / "judge", "--data.max-length", 100_000,
           "--evaluation.prompts", 16, "--rl.validation-prompts", 16, *flags]  # fmt: skip
    settings = [options.recipe, *map(str, own)]
    peak, seconds = measured(["run", *settings, "--run-dir", str(options.out / "whole")], options.out)
    print(
        f"run        {peak:5.2f} GiB  {seconds:6.1f} s  {json.loads((options.out / 'whole/seconds.json').read_text())}"
    )
    if options.stages:
        place = str(options.out / "apart")
        for words in (["prepare", *settings, "--run-dir", place], *([stage, place] for stage in
                      ("sft", "train", "evaluate", "report"))):  # fmt: skip
            peak, seconds = measured(words, options.out)
            print(f"{words[0]:<10} {peak:5.2f} GiB  {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
