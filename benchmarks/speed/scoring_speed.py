"""How fast does a classifier score responses, compared with transformers' pipeline? Random weights, no network.

    python benchmarks/speed/scoring_speed.py     takes long on 2 cores; use --texts 64 for a first look

creates a RoBERTa-base and texts with the lengths of summaries (10 to 60 tokens, half of them below 25; one in ten
repeats another). It scores them in turn with the plain pipeline, with batches and with Classifier, and prints a table:
texts per second relative to the plain pipeline (median of the rounds), and the largest difference in probability.
If other programs use the machine, processor time is more reliable than the clock.
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

VOCABULARY = 50_265
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
# The lengths of texts in tokens. The logarithms of the lengths of DialogSum's and SAMSum's summaries have standard
# deviations of 0.41 and 0.51.
MEDIAN = 25
LOG_STD = 0.45
SHORTEST = 10
LONGEST = 60
REPEATED = 0.1  # The share of texts that repeat another.


class Took(NamedTuple):
    """The time for scoring all texts: seconds on the clock, seconds of processor time."""

    clock: float
    processor: float


def roberta() -> Classifier:
    """Return a RoBERTa-base with random weights and a word-level tokenizer of the same vocabulary size."""
    vocabulary = SPECIAL + [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]
    model = models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>")
    word_level = Tokenizer(model)
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    word_level.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    return Classifier(RobertaForSequenceClassification(config), tokenizer, toxic=1, good=0)


def responses(count: int, draw: random.Random) -> list[str]:
    """Return texts of random words; one in ten repeats one of the last eight, as samples of one prompt do."""
    texts: list[str] = []
    while len(texts) < count:
        length = int(draw.lognormvariate(math.log(MEDIAN), LOG_STD))
        if texts and draw.random() < REPEATED:
            texts.append(draw.choice(texts[-8:]))
        elif SHORTEST <= length <= LONGEST:
            texts.append(" ".join(f"w{draw.randrange(VOCABULARY - len(SPECIAL))}" for _ in range(length - 2)))
    return texts


def toxicity_of(output: Sequence[Sequence[dict[str, Any]]]) -> torch.Tensor:
    """Return the probabilities of the second label in a pipeline's output for top_k=None."""
    by_label = [{score["label"]: score["score"] for score in scores} for scores in output]
    return torch.tensor([scores["LABEL_1"] for scores in by_label])


def timed(work: Callable[[], torch.Tensor]) -> tuple[Took, torch.Tensor]:
    """Return how long `work` took, and its result."""
    clock = time.perf_counter()
    processor = time.process_time()
    result = work()
    return Took(time.perf_counter() - clock, time.process_time() - processor), result


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    classifier = roberta()
    texts = responses(options.texts, random.Random(0))
    pipe: Any = pipeline("text-classification", model=classifier.model, tokenizer=classifier.tokenizer, device="cpu")
    methods: dict[str, Callable[[], torch.Tensor]] = {
        "pipe(texts)": lambda: toxicity_of(pipe(texts, top_k=None)),
        "pipe(texts, batch_size=16)": lambda: toxicity_of(pipe(texts, top_k=None, batch_size=16)),
        "pipe(texts, batch_size=32)": lambda: toxicity_of(pipe(texts, top_k=None, batch_size=32)),
        "Classifier.toxicity(texts)": lambda: classifier.toxicity(texts),
    }

    times: dict[str, list[Took]] = {name: [] for name in methods}
    results: dict[str, torch.Tensor] = {}
    for _ in range(options.rounds):
        for name, method in methods.items():
            took, results[name] = timed(method)
            times[name].append(took)
            print(f"{name}: {took.clock:.1f} s, {took.processor:.1f} s of processor time", file=sys.stderr, flush=True)

    print_table(times, results)
    lengths = [len(ids) for ids in classifier.tokenizer(texts).input_ids]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    print(
        f"\n{len(texts)} texts, {len(set(texts))} distinct, {min(lengths)} to {max(lengths)} tokens, median "
        f"{median(lengths):.0f}; {options.rounds} rounds by turns; {processor_name()} "
        f"({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads; {versions}"
    )


def print_table(times: dict[str, list[Took]], results: dict[str, torch.Tensor]) -> None:
    """Print the speed of each method relative to the first, and how far its probabilities differ from those."""
    first_times = next(iter(times.values()))
    expected = next(iter(results.values()))
    print("| method | texts/s relative to the first | by processor time | largest difference in probability |")
    print("|---|---|---|---|")
    for name, rounds in times.items():
        pairs = list(zip(first_times, rounds, strict=True))
        clock = median(first.clock / took.clock for first, took in pairs)
        processor = median(first.processor / took.processor for first, took in pairs)
        difference = (results[name] - expected).abs().max()
        print(f"| `{name}` | {clock:.2f} | {processor:.2f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
