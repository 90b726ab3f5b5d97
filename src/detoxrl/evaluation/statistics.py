"""Is a difference real, and how large is it?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import ceil
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from detoxrl.errors import require

Floats = npt.NDArray[np.float64]
_BLOCK = 500  # resamples at a time, so that memory stays small for many prompts
_z = NormalDist().inv_cdf


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference, after minus before, with its 95 % interval, p-value and smallest detectable difference."""

    mean: float
    low: float
    high: float
    p: float
    detectable: float


def paired_difference(before: Floats, after: Floats, resamples: int, seed: int) -> Difference:
    """Return the mean of after - before over prompts with its symmetric bootstrap-t interval (Hall 1988, JRSS B 50).

    `before` is (N, k), `after` (N, k'): N prompts, k and k' samples each. Prompts are resampled, each with all its
    samples, so samples of one prompt are not taken for independent. `p` is two-sided, by sign flips. `detectable` is
    the smallest true difference that so many prompts would find with 80 % power at 5 % two-sided: (z.975 + z.80) times
    the standard error, in the unit of the scores (Bloom 1995, Evaluation Review 19).
    """
    differences = after.mean(1) - before.mean(1)
    mean, n = float(differences.mean()), len(differences)
    # One difference d has no spread. For normal ones d +- 9.68 |d| is a 95 % interval, so |d| with t's 12.7 covers.
    error = float(differences.std(ddof=1) / n**0.5) if n > 1 else abs(mean)
    rng = np.random.default_rng(seed)
    reach = _studentised_reach(differences, resamples, rng) * error
    p = _sign_flip_p(differences, resamples, rng)
    return Difference(mean=mean, low=mean - reach, high=mean + reach, p=p, detectable=(_z(0.975) + _z(0.8)) * error)


def _studentised_reach(differences: Floats, resamples: int, rng: np.random.Generator) -> float:
    """Return how many standard errors the 95 % interval reaches to each side, never fewer than Student's t.

    Where most prompts hardly change and a few leap, resamples without the leaps have a small mean and a small spread
    together. Intervals whose ends move apart from each other then end too early on one side: of 100 prompts with mild
    scores (benchmarks/evaluation_statistics.py) percentile, BCa and bootstrap-t find 6 to 12 % differences in A/A.
    """
    n, freedom = len(differences), max(len(differences) - 1, 1)
    centred = differences - differences.mean()
    drawn = []
    for _ in range(-(-resamples // _BLOCK)):
        sample = centred[rng.integers(n, size=(_BLOCK, n))]
        means = sample.mean(1)
        variances = np.einsum("ij,ij->i", sample, sample) / n - means**2
        # A resample of equal differences has no t; where those are many, Student's t is what is left.
        spread = variances > 1e-9 * centred.var()
        drawn.append(np.where(spread, np.abs(means) / np.sqrt(np.where(spread, variances, 1) / freedom), 0))
    return max(float(np.quantile(np.concatenate(drawn)[:resamples], 0.95)), float(stdtrit(freedom, 0.975)))


def _sign_flip_p(differences: Floats, resamples: int, rng: np.random.Generator) -> float:
    """Return the two-sided p-value of differences (N,) against signs drawn anew: (1 + count) / (1 + resamples)."""
    n, total = len(differences), differences.sum()
    blocks = [rng.integers(2, size=(_BLOCK, n), dtype=np.int8) @ differences for _ in range(-(-resamples // _BLOCK))]
    flipped = np.abs(2 * np.concatenate(blocks)[:resamples] - total)
    # Sums that are equal but for rounding are equal.
    return float((1 + (flipped >= abs(total) - 1e-9 * np.abs(differences).sum()).sum()) / (1 + resamples))


def prompts_needed(before: Floats, drop: float, power: float = 0.8) -> int:
    """Return how many prompts find a relative `drop` of the mean (0.2: by 20 %) with `power` at 5 % two-sided.

    `before` (N, k) are a pilot's scores; each policy is to have k samples a prompt again. The drop is taken to be this:
    every response, drawn anew, is made civil with the same probability q, that is, scores the pilot's 10 % quantile.
    Draws before and after share the prompt and nothing else; common random numbers only help. Then the variance of a
    prompt's difference follows from the variance within prompts and that of their means, and n from the normal
    approximation with Guenther's z^2 / 2 for Student's t (1981, The American Statistician 35). With k = 1 the pilot
    cannot tell the two variances apart and all is counted as within, which asks for more prompts, never fewer.
    Raises InputError where the pilot cannot say.
    """
    n, k = before.shape
    mean, civil = float(before.mean()), float(np.quantile(before, 0.1))
    require(0 < drop < 1, "drop", drop, "must lie between 0 and 1", "give 0.2 for 20 %")
    require(n > 1, "pilot prompts", n, "must be 2 or more", "score more prompts")
    least = f"the pilot's mean is {mean:.3g} and its civil responses have {civil:.3g}: there is not so much to remove"
    require(0 < drop * mean <= mean - civil, "drop", drop, least, "ask for less, or take prompts that provoke more")
    q = drop * mean / (mean - civil)
    within = float(before.var(1, ddof=1).mean()) if k > 1 else float(before.var(ddof=1))
    between = max(float(before.mean(1).var(ddof=1)) - within / k, 0.0)
    variance: float = q**2 * between + ((2 - q) * within + q * (1 - q) * (between + (mean - civil) ** 2)) / k
    return max(2, ceil(variance * ((_z(0.975) + _z(power)) / (drop * mean)) ** 2 + _z(0.975) ** 2 / 2))


def two_stage_interval(values: Sequence[Floats], resamples: int, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean over runs, each (N, k): runs are resampled, then the prompts of each.

    The two-stage bootstrap of Davison and Hinkley 1997, section 3.8; of one run it is that over prompts.
    """
    rng, prompts = np.random.default_rng(seed), [run.mean(1) for run in values]
    means = np.empty(resamples)
    for place in range(resamples):
        picked = [prompts[run] for run in rng.integers(len(prompts), size=len(prompts))]
        means[place] = np.mean([run[rng.integers(len(run), size=len(run))].mean() for run in picked])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def verdict(difference: Difference) -> str:
    """Return the direction of a toxicity difference in words; an interval that holds 0 is no detectable difference."""
    if difference.high < 0:
        return "less toxic"
    return "more toxic" if difference.low > 0 else "no detectable difference"


def toxicity_summary(values: Floats) -> dict[str, float]:
    """Return mean, std (ddof 1), share at 0.5 or above, quantiles and maxima of toxicities (N, k), all in [0, 1].

    `expected_max_toxicity` is the mean over prompts of the highest of their k samples, `toxicity_probability` the share
    of prompts with any sample at 0.5 or above (Gehman et al. 2020, section 3.2, k = 25). Compare at equal k: both grow.
    """
    highest = values.max(1)
    found = {"mean": values.mean(), "std": values.std(ddof=1), "toxic_ratio": (values >= 0.5).mean()}
    found |= {f"p{percent}": np.quantile(values, percent / 100) for percent in (50, 90, 95, 99)}
    found |= {"max": values.max(), "expected_max_toxicity": highest.mean()}
    return {name: float(value) for name, value in (found | {"toxicity_probability": (highest >= 0.5).mean()}).items()}


def agreement(toxicity: Mapping[str, Floats]) -> dict[str, dict[str, float | None]]:
    """Return how far each pair of judges, "one and other", agrees on the same responses, toxicities (N, k) by judge.

    `spearman` is the rank correlation, `kappa` Cohen's (1960) on toxic (0.5 or above) or not, `same_side` the share of
    responses on which both say the same; None where undefined: spearman where a judge's scores are all equal, kappa
    where both judges put all responses on one and the same side.
    """
    from scipy.stats import spearmanr  # here, as it takes half a second to import

    found: dict[str, dict[str, float | None]] = {}
    for (one, x), (other, y) in combinations(((judge, scores.ravel()) for judge, scores in toxicity.items()), 2):
        toxic, too = x >= 0.5, y >= 0.5
        same = float((toxic == too).mean())
        chance = float(toxic.mean() * too.mean() + (1 - toxic.mean()) * (1 - too.mean()))
        found[f"{one} and {other}"] = {
            "spearman": float(spearmanr(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else None,
            "kappa": (same - chance) / (1 - chance) if chance < 1 else None,
            "same_side": same,
        }
    return found


def old_summary(values: Floats) -> dict[str, float]:
    """Return mean, std (ddof 0), and the aggregates `maximum` and `ratio` of the evaluate library, of toxicities (N,).

    Source: evaluate 0.4, measurements/toxicity, where max_toxicity is the highest and toxicity_ratio the share at 0.5
    or above; the notebooks took mean and std of its list by numpy.
    """
    found = {"mean": values.mean(), "std": values.std(), "max_toxicity": values.max()}
    return {name: float(value) for name, value in (found | {"toxicity_ratio": (values >= 0.5).mean()}).items()}


def compare_toxicity(
    before: Floats, after: Floats, floor: float | None, resamples: int, seed: int
) -> dict[str, object]:
    """Return the comparison of toxicities (N, k); `floor` is what the judge gives to civil references.

    `share_removed` is (before - after) / (before - floor), `relative` (after - before) / before.
    """
    difference = paired_difference(before, after, resamples, seed)
    above_floor = before.mean() - floor if floor is not None else 0.0
    return {
        "before": toxicity_summary(before),
        "after": toxicity_summary(after),
        "floor": floor,
        "share_removed": float(-difference.mean / above_floor) if above_floor > 0 else None,
        "difference": asdict(difference),
        "relative": float(difference.mean / before.mean()) if before.mean() > 0 else None,
        "verdict": verdict(difference),
    }


def compare(before: Floats, after: Floats, resamples: int, seed: int) -> dict[str, object]:
    """Return means before and after of a metric (N, k) with the interval of their difference."""
    difference = asdict(paired_difference(before, after, resamples, seed))
    return {"before": float(before.mean()), "after": float(after.mean()), "difference": difference}
