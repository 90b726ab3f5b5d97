"""Are the intervals, p-values and sample sizes of an evaluation correct where the truth is known?

    python benchmarks/evaluation/evaluation_statistics.py [--simulations 1000]     one to four minutes on one core

It simulates evaluations with scores shaped like those of a judge on real text. The first table says how often the 95 %
interval holds the truth, how often a difference is called, and how often its p-value is below 0.05; the second one how
often a drop is found with as many prompts as `prompts_needed` asked for. Two standard errors of a share of 1,000 are
1.4 points at 95 % and 2.5 points at 80 %. No network.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from detoxrl.evaluation.statistics import Difference, paired_difference, prompts_needed, verdict

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
# What becomes civil under a policy that is less toxic.
CIVIL_MADE = ("responses", "prompts", "toxic responses", "every score")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Scores of one kind of text: their log-odds are normal within civil and within toxic responses.

    A prompt gets a toxic response with a probability drawn from Beta(rate, 1 - rate): most prompts almost never, a few
    almost always. The mean civil log-odds of a prompt varies as much (std 1) as the civil responses of one prompt do.
    """

    rate: float
    toxic: tuple[float, float]
    civil: float


# Chosen to match alt-profanity-check on public texts: quantiles (5, 25, 50, 75, 90, 95, 99 %), the share at 0.5 or
# above, and the correlation of two samples of a prompt.
SHAPES = {
    # The shape: .004 .010 .026 .068 .17 .32 .84; 3 %; 0.39.
    # 9,017 replies in chats (DiaSafety): .003 .011 .027 .066 .17 .32 .79; 2.5 %; 0.22 (summaries of DialogSum: 0.60).
    "mild": Shape(rate=0.04, toxic=(0.5, 1.6), civil=-3.7),
    # The shape: .004 .019 .061 .27 .89 .97 1.0; 19 %; 0.38.
    # 5,000 continuations of RealToxicityPrompts: .005 .020 .064 .31 .89 .99 1.0; 19 %.
    "harsh": Shape(rate=0.25, toxic=(1.5, 2.5), civil=-3.3),
}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Of all scores of a shape: the mean, the mean of the civil ones, and the 10 % quantile."""

    mean: float
    civil: float
    tenth: float


def truth(shape: Shape) -> Truth:
    """Return the truth of a shape: means by the midpoint rule on normal quantiles, the tenth from 10^6 draws."""
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / 50_000) for i in range(50_000)])

    def mean_score(mean: float, std: float) -> float:
        return float((1 / (1 + np.exp(-mean - std * normal))).mean())

    civil = mean_score(shape.civil, 2**0.5)
    toxic = mean_score(*shape.toxic)
    tenth = float(np.quantile(Evaluation(shape, 1_000_000, 1, np.random.default_rng(0)).before, 0.1))
    return Truth(mean=civil + shape.rate * (toxic - civil), civil=civil, tenth=tenth)


class Evaluation:
    """Scores (n, k) of one policy, `before`, on n new prompts; `after` draws those of another on the same prompts."""

    def __init__(self, shape: Shape, n: int, k: int, rng: np.random.Generator) -> None:
        self.shape = shape
        self.k = k
        self.rng = rng
        self.toxic = rng.beta(shape.rate, 1 - shape.rate, (n, 1))
        self.civil = rng.normal(shape.civil, 1, (n, 1))
        self.before = self.draw(self.toxic)

    def draw(self, toxic: Floats) -> Floats:
        """Draw scores (n, k) where each prompt has this probability (n, 1) of a toxic response."""
        size = (len(toxic), self.k)
        civil = self.civil + self.rng.normal(size=size)
        odds = np.where(self.rng.random(size) < toxic, self.rng.normal(*self.shape.toxic, size), civil)
        return 1 / (1 + np.exp(-odds))

    def after(self, made_civil: str, drop: float, known: Truth) -> Floats:
        """Draw scores (n, k) with a mean that is lower by the share `drop`, which `made_civil` brings about."""
        if made_civil == "toxic responses":
            return self.draw(self._less_often_toxic(drop, known))

        scores = self.draw(self.toxic)
        if made_civil == "every score":
            return (1 - drop) * scores
        chance = drop * known.mean / (known.mean - known.tenth)
        size = (len(scores), 1) if made_civil == "prompts" else scores.shape
        return np.where(self.rng.random(size) < chance, known.tenth, scores)

    def _less_often_toxic(self, drop: float, known: Truth) -> Floats:
        """Return each prompt's new probability (n, 1) of a toxic response; the reduction differs widely by prompt."""
        if not drop:
            return self.toxic
        chance = drop * known.mean / (known.mean - known.civil)
        return self.toxic * (1 - self.rng.beta(chance, 1 - chance, self.toxic.shape))


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of evaluations in which the interval holds the truth, a difference is called, p is below 0.05."""

    holds: float
    called: float
    p: float


def shares(differences: list[Difference], mean: float) -> Shares:
    """Return the shares over evaluations whose true difference is `mean`."""
    return Shares(
        holds=float(np.mean([difference.low <= mean <= difference.high for difference in differences])),
        called=float(np.mean([verdict(difference) != "no detectable difference" for difference in differences])),
        p=float(np.mean([difference.p < 0.05 for difference in differences])),
    )


def evaluations(shape: Shape, n: int, k: int, drop: float, simulations: int, rng: np.random.Generator) -> Shares:
    """Return the shares over evaluations of n prompts in which toxic responses were made civil."""
    known = truth(shape)
    differences = []
    for seed in range(simulations):
        evaluation = Evaluation(shape, n, k, rng)
        after = evaluation.after("toxic responses", drop, known)
        differences.append(paired_difference(evaluation.before, after, RESAMPLES, seed))
    return shares(differences, -drop * known.mean)


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """A line of the second table: a pilot of `prompts` with k samples each, and what becomes civil afterwards."""

    scores: str
    prompts: int
    k: int = 4
    made_civil: str = "responses"


PILOTS = (
    *(Pilot(scores="harsh", prompts=prompts) for prompts in (30, 50, 100, 200, 400)),
    *(Pilot(scores="harsh", prompts=400, made_civil=made_civil) for made_civil in CIVIL_MADE[1:]),
    Pilot(scores="harsh", prompts=400, k=1),
    Pilot(scores="harsh", prompts=400, k=2),
    *(Pilot(scores="mild", prompts=prompts) for prompts in (100, 200, 400, 1000)),
    *(Pilot(scores="mild", prompts=400, made_civil=made_civil) for made_civil in CIVIL_MADE[1:]),
)


def asked_and_found(pilot: Pilot, drop: float, simulations: int, rng: np.random.Generator) -> tuple[list[int], float]:
    """Return how many prompts pilots asked for, and in which share of evaluations of as many the drop was found."""
    shape = SHAPES[pilot.scores]
    known = truth(shape)
    asked = []
    detected = 0
    for seed in range(simulations):
        needed = prompts_needed(Evaluation(shape, pilot.prompts, pilot.k, rng).before, drop)
        evaluation = Evaluation(shape, needed, pilot.k, rng)
        after = evaluation.after(pilot.made_civil, drop, known)
        difference = paired_difference(evaluation.before, after, RESAMPLES, seed)
        asked.append(needed)
        detected += verdict(difference) == "less toxic"
    return asked, detected / simulations


def print_shares(simulations: int, rng: np.random.Generator) -> None:
    print("| scores | prompts | samples | true drop | interval holds it | difference called | p < 0.05 |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, shape in SHAPES.items():
        known = truth(shape)
        removable = 1 - known.civil / known.mean
        for drop, k, n in itertools.product((0.0, 0.4 * removable, 0.8 * removable), (1, 4), (30, 50, 100, 400)):
            result = evaluations(shape, n, k, drop, simulations, rng)
            cells = f"{result.holds:.1%} | {result.called:.1%} | {result.p:.1%}"
            print(f"| {name} | {n} | {k} | {drop:.0%} | {cells} |", flush=True)


def print_pilots(simulations: int, rng: np.random.Generator) -> None:
    print("| scores | pilot's prompts | samples | 20 % less by civil | prompts asked for, 5 to 95 % | found |")
    print("|---|--:|--:|---|--:|--:|")
    for pilot in PILOTS:
        asked, detected = asked_and_found(pilot, 0.2, simulations, rng)
        low, high = np.quantile(asked, [0.05, 0.95])
        cells = f"{pilot.made_civil} | {low:.0f} to {high:.0f} | {detected:.1%}"
        print(f"| {pilot.scores} | {pilot.prompts} | {pilot.k} | {cells} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    print(f"seed {options.seed}, {options.simulations} evaluations a row, {RESAMPLES} resamples\n")
    print_shares(options.simulations, rng)
    print()
    print_pilots(options.simulations, rng)


if __name__ == "__main__":
    main()
