"""Do the intervals, p-values and sample sizes of an evaluation hold what they promise?

    python benchmarks/evaluation_statistics.py [--simulations 1000]     one to four minutes on one core; no network

draws evaluations whose truth is known, with scores shaped like those that a judge gives to real text, and prints how
often the 95 % interval holds the truth, how often a difference is called, how often its p-value is below 0.05; then
how often a drop is found with as many prompts as `prompts_needed` asked for. Chance alone moves a share of 1,000 by
1.4 points at 95 %, by 2.5 points at 80 % (two standard errors).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from detoxrl.evaluation.statistics import Difference, paired_difference, prompts_needed, verdict

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
CIVIL_MADE = ("responses", "prompts", "toxic responses", "every score")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Scores of one kind of text: their log-odds are normal within civil and within toxic responses.

    A prompt gets a toxic response with a chance drawn from Beta(rate, 1 - rate): most prompts nearly never, a few
    nearly always. Means of civil log-odds differ by prompt as much (std 1) as civil responses of one prompt do.
    """

    rate: float
    toxic: tuple[float, float]
    civil: float


# Chosen by the quantiles (5, 25, 50, 75, 90, 95, 99 %) that alt-profanity-check gives to public texts.
SHAPES = {
    # This has .004 .010 .026 .068 .17 .32 .84, 3 % at 0.5 or above, two samples of a prompt correlate by 0.39. 9,017
    # replies in chats (DiaSafety) have .003 .011 .027 .066 .17 .32 .79, 2.5 %, 0.22 (summaries of DialogSum 0.60).
    "mild": Shape(rate=0.04, toxic=(0.5, 1.6), civil=-3.7),
    # This has .004 .019 .061 .27 .89 .97 1.0, 19 %, 0.38. 5,000 continuations of RealToxicityPrompts have
    # .005 .020 .064 .31 .89 .99 1.0, 19 %.
    "harsh": Shape(rate=0.25, toxic=(1.5, 2.5), civil=-3.3),
}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What holds of all scores of a shape: mean, mean of the civil ones, lowest tenth."""

    mean: float
    civil: float
    tenth: float


def truth(shape: Shape) -> Truth:
    """Return the truth of a shape: means by the midpoint rule on the normal's quantiles, the tenth from 10^6 draws."""
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / 50_000) for i in range(50_000)])
    civil, toxic = (
        float((1 / (1 + np.exp(-mean - std * normal))).mean()) for mean, std in ((shape.civil, 2**0.5), shape.toxic)
    )
    tenth = float(np.quantile(Evaluation(shape, 1_000_000, 1, np.random.default_rng(0)).before, 0.1))
    return Truth(mean=civil + shape.rate * (toxic - civil), civil=civil, tenth=tenth)


class Evaluation:
    """Scores (n, k) of one policy, `before`, on n new prompts, and what another policy would get on the same."""

    def __init__(self, shape: Shape, n: int, k: int, rng: np.random.Generator) -> None:
        self.shape, self.k, self.rng = shape, k, rng
        self.toxic = rng.beta(shape.rate, 1 - shape.rate, (n, 1))
        self.civil = rng.normal(shape.civil, 1, (n, 1))
        self.before = self.drawn(self.toxic)

    def drawn(self, toxic: Floats) -> Floats:
        """Return scores drawn anew where each prompt has this chance (n, 1) of a toxic response."""
        size = (len(toxic), self.k)
        civil = self.civil + self.rng.normal(size=size)
        odds = np.where(self.rng.random(size) < toxic, self.rng.normal(*self.shape.toxic, size), civil)
        return 1 / (1 + np.exp(-odds))

    def after(self, made_civil: str, drop: float, known: Truth) -> Floats:
        """Return scores whose mean is lower by the share `drop`, by one of four ways in which policies get civil."""
        if made_civil == "toxic responses":  # by a chance that differs widely between prompts
            chance = drop * known.mean / (known.mean - known.civil)
            return self.drawn(
                self.toxic * (1 - self.rng.beta(chance, 1 - chance, self.toxic.shape)) if drop else self.toxic
            )
        drawn = self.drawn(self.toxic)
        if made_civil == "every score":
            return (1 - drop) * drawn
        chance = drop * known.mean / (known.mean - known.tenth)
        size = (len(drawn), 1) if made_civil == "prompts" else drawn.shape
        return np.where(self.rng.random(size) < chance, known.tenth, drawn)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of evaluations: interval holds the truth, difference called, p below 0.05."""

    holds: float
    called: float
    p: float


def shares(found: list[Difference], mean: float) -> Shares:
    """Return the shares over evaluations whose true difference is `mean`."""
    return Shares(
        holds=float(np.mean([one.low <= mean <= one.high for one in found])),
        called=float(np.mean([verdict(one) != "no detectable difference" for one in found])),
        p=float(np.mean([one.p < 0.05 for one in found])),
    )


def evaluations(shape: Shape, n: int, k: int, drop: float, simulations: int, rng: np.random.Generator) -> Shares:
    """Return the shares over evaluations of n prompts in which toxic responses were made civil."""
    known, found = truth(shape), []
    for seed in range(simulations):
        one = Evaluation(shape, n, k, rng)
        found.append(paired_difference(one.before, one.after("toxic responses", drop, known), RESAMPLES, seed))
    return shares(found, -drop * known.mean)


def asked_and_found(
    shape: Shape, pilot: int, k: int, made_civil: str, drop: float, simulations: int, rng: np.random.Generator
) -> tuple[list[int], float]:
    """Return how many prompts pilots asked for, and how often evaluations of so many found the drop."""
    known = truth(shape)
    asked, found = [], 0
    for seed in range(simulations):
        asked.append(prompts_needed(Evaluation(shape, pilot, k, rng).before, drop))
        one = Evaluation(shape, asked[-1], k, rng)
        found += (
            verdict(paired_difference(one.before, one.after(made_civil, drop, known), RESAMPLES, seed)) == "less toxic"
        )
    return asked, found / simulations


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    print(f"seed {given.seed}, {given.simulations} evaluations a row, {RESAMPLES} resamples\n")
    print("| scores | prompts | samples | true drop | interval holds it | difference called | p < 0.05 |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, shape in SHAPES.items():
        known = truth(shape)
        for drop in (0.0, 0.4 * (1 - known.civil / known.mean), 0.8 * (1 - known.civil / known.mean)):
            for k in (1, 4):
                for n in (30, 50, 100, 400):
                    got = evaluations(shape, n, k, drop, given.simulations, rng)
                    cells = f"{got.holds:.1%} | {got.called:.1%} | {got.p:.1%}"
                    print(f"| {name} | {n} | {k} | {drop:.0%} | {cells} |", flush=True)
    print("\n| scores | pilot's prompts | samples | 20 % less by civil | prompts asked for, 5 to 95 % | found |")
    print("|---|--:|--:|---|--:|--:|")
    rows = [("harsh", pilot, 4, "responses") for pilot in (30, 50, 100, 200, 400)]
    rows += [("harsh", 400, 4, way) for way in CIVIL_MADE[1:]]
    rows += [("harsh", 400, 1, "responses"), ("harsh", 400, 2, "responses")]
    rows += [("mild", pilot, 4, "responses") for pilot in (100, 200, 400, 1000)]
    rows += [("mild", 400, 4, way) for way in CIVIL_MADE[1:]]
    for name, pilot, k, way in rows:
        asked, found = asked_and_found(SHAPES[name], pilot, k, way, 0.2, given.simulations, rng)
        low, high = np.quantile(asked, [0.05, 0.95])
        print(f"| {name} | {pilot} | {k} | {way} | {low:.0f} to {high:.0f} | {found:.1%} |", flush=True)


if __name__ == "__main__":
    main()
