"""How fast does a classifier score responses, beside transformers' pipeline? Random weights, no network.

    python benchmarks/scoring_speed.py     takes long on 2 cores; --texts 64 for a first look

makes a RoBERTa-base and texts as long as summaries are (10 to 60 tokens, half of them below 25; one in ten repeats
another), scores them by turns with the pipeline as it is, with batches, and with Classifier, and prints a table: how
many times as many texts a second as the plain pipeline, the median of the rounds, and how far probabilities lie apart.
Processor time tells more than the clock where others use the machine.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification, pipeline

from detoxrl.rewards.classifier import Classifier

WORDS, SPECIAL = 50_265, ["<s>", "<pad>", "</s>", "<unk>"]
# Of the summaries of DialogSum and SAMSum the logarithms of lengths have standard deviations of 0.41 and 0.51.
MEDIAN, SPREAD, SHORTEST, LONGEST, REPEATED = 25, 0.45, 10, 60, 0.1


class Took(NamedTuple):
    """What one scoring of all texts took: seconds on the clock, seconds of processor time."""

    clock: float
    processor: float


def roberta() -> Classifier:
    """A RoBERTa-base of random weights with a tokenizer of as many words, each of them one token."""
    words = SPECIAL + [f"w{i}" for i in range(WORDS - len(SPECIAL))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=WORDS, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    return Classifier(RobertaForSequenceClassification(config), tokenizer, toxic=1, good=0)


def responses(count: int, draw: random.Random) -> list[str]:
    """Texts of random words; one in ten is one of the last eight again, as samples of one prompt are."""
    texts: list[str] = []
    while len(texts) < count:
        length = int(draw.lognormvariate(math.log(MEDIAN), SPREAD))
        if texts and draw.random() < REPEATED:
            texts.append(draw.choice(texts[-8:]))
        elif SHORTEST <= length <= LONGEST:
            texts.append(" ".join(f"w{draw.randrange(WORDS - len(SPECIAL))}" for _ in range(length - 2)))
    return texts


def toxic(found: Sequence[Sequence[dict[str, Any]]]) -> torch.Tensor:
    """The probability of the second label in what a pipeline returns for top_k=None."""
    return torch.tensor([next(one["score"] for one in row if one["label"] == "LABEL_1") for row in found])


def timed(work: Callable[[], torch.Tensor]) -> tuple[Took, torch.Tensor]:
    clock, processor = time.perf_counter(), time.process_time()
    found = work()
    return Took(time.perf_counter() - clock, time.process_time() - processor), found


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    classifier, texts = roberta(), responses(options.texts, random.Random(0))
    pipe: Any = pipeline("text-classification", model=classifier.model, tokenizer=classifier.tokenizer, device="cpu")
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "pipe(texts)": lambda: toxic(pipe(texts, top_k=None)),
        "pipe(texts, batch_size=16)": lambda: toxic(pipe(texts, top_k=None, batch_size=16)),
        "pipe(texts, batch_size=32)": lambda: toxic(pipe(texts, top_k=None, batch_size=32)),
        "Classifier.toxicity(texts)": lambda: classifier.toxicity(texts),
    }
    took: dict[str, list[Took]] = {name: [] for name in ways}
    found: dict[str, torch.Tensor] = {}
    for _ in range(options.rounds):
        for name, work in ways.items():
            one, found[name] = timed(work)
            took[name].append(one)
            print(f"{name}: {one.clock:.1f} s, {one.processor:.1f} s of processor time", file=sys.stderr, flush=True)
    plain, wanted = next(iter(took.values())), next(iter(found.values()))
    print("| way | texts/s against the first | by processor time | largest difference in probability |")
    print("|---|---|---|---|")
    for name, times in took.items():
        clock, processor = (median(a[i] / b[i] for a, b in zip(plain, times, strict=True)) for i in range(2))
        print(f"| `{name}` | {clock:.2f} | {processor:.2f} | {(found[name] - wanted).abs().max():.1e} |")
    lengths = [len(ids) for ids in classifier.tokenizer(texts).input_ids]
    print(
        f"\n{len(texts)} texts, {len(set(texts))} distinct, {min(lengths)} to {max(lengths)} tokens, median "
        f"{median(lengths):.0f}; {options.rounds} rounds by turns; {processor_name()} "
        f"({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads; "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    )


if __name__ == "__main__":
    main()
