"""How many texts does a judge rate in a second on this processor?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median

import torch

from detoxrl.evaluation.judges import Judge
from judge_measures import Benchmark, Table

_PASSES = 3
_TEXTS = 1000  # Of a pass.
_WARM_UP = 100
# With the two special tokens of a BERT these are 25 tokens: each word is one in its vocabulary.
_WORDS = 23
_COMMON_WORDS = (
    "about after again all and around as at away back because before between big both but by call can city close come "
    "country day different do door down each early end even every eye family far few find first for friend from garden "
    "give go good great green group hand have head hear help here high home house if in into it keep kind know land "
    "large last learn leave letter life light like line little live long look make many may mean morning most mother "
    "music name near need never new next night now of often old on one only open or other our out over page part"
)


def distinct_texts(count: int, seed: int) -> list[str]:
    """Return distinct texts of common English words, 25 tokens long in the vocabulary of BERT and of MiniLM."""
    rng = random.Random(f"texts of 25 tokens {seed}")
    vocabulary = _COMMON_WORDS.split()
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(rng.choice(vocabulary) for _ in range(_WORDS))] = None
    return list(texts)


def texts_per_second(judge: Judge, seed: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the median of three passes, each over other texts, after a warm-up."""
    judge(distinct_texts(_WARM_UP, seed))
    rates = []
    for number in range(1, _PASSES + 1):
        texts = distinct_texts(_TEXTS, seed + number)
        start = clock()
        judge(texts)
        rates.append(len(texts) / (clock() - start))
    return median(rates)


def speed(benchmark: Benchmark) -> Table:
    """Return the speed of each judge, and what it was measured on."""
    rows = [[name, f"{texts_per_second(judge, benchmark.seed):,.0f}"] for name, judge in benchmark.loaded.items()]
    machine = (
        f"threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    caption = f"Distinct texts of 25 tokens, median of {_PASSES} passes over {_TEXTS} texts; {machine}."
    return Table(caption, ["judge", "texts per second"], rows)
