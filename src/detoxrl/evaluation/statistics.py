"""Is a difference real, and how large is it?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from math import ceil
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from detoxrl.errors import require
from detoxrl.runtime.run_folder import INITIAL_KEPT

Floats = npt.NDArray[np.float64]
Json = dict[str, Any]  # a part of eval.json
# Standard errors are unreliable below this number of prompts, because toxicity is skewed.
_FEWEST_PROMPTS = 20
# The fewest units of which all changes of sign can give a p-value below 5 %.
_FEWEST_UNITS = 6
# Resamples drawn at a time; bounds the memory that many prompts take.
_BLOCK = 500
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

    `before` is (N, k) and `after` (N, k'): N prompts with k and k' samples each. Prompts are resampled, each with all
    its samples, because samples of one prompt are not independent. `p` is two-sided, by sign flips. `detectable` is the
    smallest true difference that a test at 5 % two-sided finds with 80 % power on as many prompts:
    (z.975 + z.80) standard errors, in the unit of the scores (Bloom 1995, Evaluation Review 19).
    """
    differences = after.mean(1) - before.mean(1)
    n = len(differences)
    mean = float(differences.mean())
    # One difference d has no spread. If it is normal, d +- 9.68 |d| is a 95 % interval, so |d| as the standard error
    # with Student's t of 12.7 covers.
    error = float(differences.std(ddof=1) / n**0.5) if n > 1 else abs(mean)

    rng = np.random.default_rng(seed)
    reach = _interval_reach(differences, resamples, rng) * error
    p = _sign_flip_p(differences, resamples, rng)

    detectable = (_z(0.975) + _z(0.8)) * error
    return Difference(mean=mean, low=mean - reach, high=mean + reach, p=p, detectable=detectable)


def _interval_reach(differences: Floats, resamples: int, rng: np.random.Generator) -> float:
    """Return how many standard errors the 95 % interval reaches to each side; at least those of Student's t.

    Toxicity changes little on most prompts and much on a few. Resamples without the large changes have both a small
    mean and a small spread, so an interval whose two ends are found separately is too short on one side: percentile,
    BCa and equal-tailed bootstrap-t call 6 to 12 % of comparisons of a policy with itself different (100 prompts with
    mild scores, benchmarks/evaluation/evaluation_statistics.py).
    """
    n = len(differences)
    freedom = max(n - 1, 1)
    centred = differences - differences.mean()

    blocks = []
    for _ in range(_blocks(resamples)):
        sample = centred[rng.integers(n, size=(_BLOCK, n))]
        means = sample.mean(1)
        variances = np.einsum("ij,ij->i", sample, sample) / n - means**2
        # A resample of equal differences has no t and counts as 0; where there are many, Student's t decides.
        has_spread = variances > 1e-9 * centred.var()
        errors = np.sqrt(np.where(has_spread, variances, 1) / freedom)
        blocks.append(np.where(has_spread, np.abs(means) / errors, 0))

    studentised = np.concatenate(blocks)[:resamples]
    return max(float(np.quantile(studentised, 0.95)), float(stdtrit(freedom, 0.975)))


def _sign_flip_p(differences: Floats, resamples: int, rng: np.random.Generator) -> float:
    """Return the two-sided p-value of differences (N,) under random signs: (1 + count) / (1 + resamples)."""
    n = len(differences)
    total = differences.sum()

    blocks = []
    for _ in range(_blocks(resamples)):
        signs = rng.integers(2, size=(_BLOCK, n), dtype=np.int8)
        blocks.append(signs @ differences)
    flipped = np.abs(2 * np.concatenate(blocks)[:resamples] - total)

    # Sums that differ only by rounding count as equal.
    rounding = 1e-9 * np.abs(differences).sum()
    return float((1 + (flipped >= abs(total) - rounding).sum()) / (1 + resamples))


def exact_difference(before: Floats, after: Floats) -> Difference:
    """Return the mean of after - before over 6 to 20 units, with p-value and 95 % interval by all changes of sign.

    `before` is (N, k) and `after` (N, k'). The bootstrap-t of `paired_difference` needs more units: where one of 14
    differs and the others hardly do, its interval is a thousand times as wide as the data. The interval is that of the
    sign-flip test: if the N differences are independent and symmetric about a centre, the centre is equally likely to
    lie in each of the 2^N gaps between the means of their subsets (Hartigan 1969, JASA 64). With fewer than 6 units no
    gap is below 2.5 %. `detectable` is as in `paired_difference`.
    """
    differences = after.mean(1) - before.mean(1)
    n = len(differences)
    assert _FEWEST_UNITS <= n <= 20
    mean = float(differences.mean())
    subsets = _subsets(n)
    sums = subsets @ differences

    means = np.sort(sums[1:] / subsets[1:].sum(1))
    outside = int(0.025 * len(subsets))
    low = float(means[outside - 1])
    high = float(means[-outside])

    # A sum under other signs is twice the sum of those that keep theirs, less the sum of all.
    total = differences.sum()
    rounding = 1e-9 * np.abs(differences).sum()
    p = float((np.abs(2 * sums - total) >= abs(total) - rounding).mean())

    error = float(differences.std(ddof=1) / n**0.5)
    return Difference(mean=mean, low=low, high=high, p=p, detectable=(_z(0.975) + _z(0.8)) * error)


@lru_cache(maxsize=4)
def _subsets(n: int) -> Floats:
    """Return all subsets of n units as rows of zeros and ones, (2^n, n), the empty one first."""
    numbers = np.arange(2**n)[:, None]
    subsets: Floats = (numbers >> np.arange(n) & 1).astype(np.float64)
    return subsets


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number m by the step-down method of Holm 1979 (Scand. J. Statist. 6).

    The i-th smallest is multiplied by m - i + 1 and is at least its predecessor's. Where no difference is real, any is
    below alpha with a probability of alpha at most, however the tests depend on each other.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _blocks(resamples: int) -> int:
    """Return how many blocks hold this many resamples."""
    return -(-resamples // _BLOCK)


def prompts_needed(before: Floats, drop: float, power: float = 0.8) -> int:
    """Return how many prompts are needed to find a relative `drop` of the mean (0.2: by 20 %) at 5 % two-sided.

    `before` (N, k) are the scores of a pilot; both policies are to have k samples per prompt again.

    The model of the drop: each response is drawn anew and becomes civil with the same probability q; a civil response
    scores the pilot's 10 % quantile. Draws before and after share the prompt and nothing else (common random numbers
    only help). The variance of a prompt's difference then follows from the variance within prompts and that of their
    means, and n from the normal approximation plus Guenther's z^2 / 2 for Student's t (1981, The American Statistician
    35). With k = 1 the pilot cannot separate the two variances; all of it counts as within, which asks for too many
    prompts, never for too few.

    Raises InputError where the pilot does not allow an answer.
    """
    n, k = before.shape
    mean = float(before.mean())
    civil = float(np.quantile(before, 0.1))
    require(0 < drop < 1, "drop", drop, "must be between 0 and 1", "0.2 means 20 %")
    require(n > 1, "pilot prompts", n, "must be 2 or more", "score more prompts")
    rule = f"is more than can be removed: the pilot's mean is {mean:.3g}, its civil responses score {civil:.3g}"
    remedy = "ask for a smaller drop, or use prompts that provoke more toxicity"
    require(0 < drop * mean <= mean - civil, "drop", drop, rule, remedy)

    q = drop * mean / (mean - civil)
    within, between = _variances(before)
    made_civil = q * (1 - q) * (between + (mean - civil) ** 2)
    variance: float = q**2 * between + ((2 - q) * within + made_civil) / k

    z = _z(0.975) + _z(power)
    needed = variance * (z / (drop * mean)) ** 2 + _z(0.975) ** 2 / 2
    return max(2, ceil(needed))


def validation_prompts_needed(toxicity: float, error: float, prompts: int) -> int | None:
    """Return how many prompts a validation needs, rounded up to tens; None if its `prompts` are enough.

    `toxicity` is the initial policy's mean over these prompts, `error` its standard error. Prompts are enough if there
    are at least 20, and if half of the toxicity is at least two standard errors: then a policy that halves it can be
    told from chance.
    """
    largest_error = toxicity / 4
    if prompts >= _FEWEST_PROMPTS and error <= largest_error:
        return None

    needed = float(_FEWEST_PROMPTS)
    if largest_error > 0:
        needed = max(needed, prompts * (error / largest_error) ** 2)
    return 10 * ceil(needed / 10)


def _variances(scores: Floats) -> tuple[float, float]:
    """Return the variance of scores (N, k) within prompts and the variance of the prompts' true means."""
    k = scores.shape[1]
    within = float(scores.var(1, ddof=1).mean() if k > 1 else scores.var(ddof=1))
    of_means = float(scores.mean(1).var(ddof=1))
    return within, max(of_means - within / k, 0.0)


def two_stage_interval(values: Sequence[Floats], resamples: int, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean over runs, each (N, k): runs are resampled, then the prompts of each.

    The two-stage bootstrap of Davison and Hinkley 1997, section 3.8. With one run only its prompts are resampled.
    """
    rng = np.random.default_rng(seed)
    runs = [run.mean(1) for run in values]

    means = np.empty(resamples)
    for resample in range(resamples):
        run_means = []
        for run in rng.integers(len(runs), size=len(runs)):
            prompts = rng.integers(len(runs[run]), size=len(runs[run]))
            run_means.append(runs[run][prompts].mean())
        means[resample] = np.mean(run_means)

    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share: Wilson 1927, JASA 22, which holds near 0 and 1 too (Brown et al. 2001)."""
    z = _z(0.975)
    share = successes / trials
    centre = share + z**2 / (2 * trials)
    reach = z * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    scale = 1 + z**2 / trials
    return max((centre - reach) / scale, 0.0), min((centre + reach) / scale, 1.0)


def verdict(difference: Difference) -> str:
    """Return the direction of a toxicity difference in words, or that an interval with 0 in it shows none."""
    if difference.high < 0:
        return "less toxic"
    if difference.low > 0:
        return "more toxic"
    return "no detectable difference"


def toxicity_summary(values: Floats) -> dict[str, float]:
    """Return mean, std (ddof 1), share at 0.5 or above, quantiles and maxima of toxicities (N, k), all in [0, 1].

    `expected_max_toxicity` is the mean over prompts of the highest of their k samples, `toxicity_probability` the share
    of prompts with any sample at 0.5 or above (Gehman et al. 2020, section 3.2, k = 25). Both grow with k, so compare
    only equal k.
    """
    highest = values.max(1)
    summary = {
        "mean": values.mean(),
        "std": values.std(ddof=1),
        "toxic_ratio": (values >= 0.5).mean(),
        "p50": np.quantile(values, 0.5),
        "p90": np.quantile(values, 0.9),
        "p95": np.quantile(values, 0.95),
        "p99": np.quantile(values, 0.99),
        "max": values.max(),
        "expected_max_toxicity": highest.mean(),
        "toxicity_probability": (highest >= 0.5).mean(),
    }
    return {name: float(value) for name, value in summary.items()}


def agreement(toxicity: Mapping[str, Floats]) -> dict[str, dict[str, float | None]]:
    """Return how far each pair of judges, "NAME and NAME", agrees on the same responses; toxicities (N, k) by judge.

    `spearman` is the rank correlation; None where all scores of a judge are equal. `kappa` is Cohen's (1960) on toxic
    (0.5 or above) or not; None where both judges put all responses on the same side. `same_side` is the share of
    responses on whose side both judges agree.
    """
    pairs = {}
    for (name, scores), (other_name, other_scores) in combinations(toxicity.items(), 2):
        pairs[f"{name} and {other_name}"] = _pair_agreement(scores.ravel(), other_scores.ravel())
    return pairs


def _pair_agreement(scores: Floats, others: Floats) -> dict[str, float | None]:
    """Return the agreement of two judges on the same responses, (N,) each."""
    # scipy.stats takes half a second to import.
    from scipy.stats import spearmanr

    spearman = None
    if np.ptp(scores) > 0 and np.ptp(others) > 0:
        spearman = float(spearmanr(scores, others).statistic)

    toxic = scores >= 0.5
    others_toxic = others >= 0.5
    same = float((toxic == others_toxic).mean())
    rate = toxic.mean()
    others_rate = others_toxic.mean()
    chance = float(rate * others_rate + (1 - rate) * (1 - others_rate))
    kappa = (same - chance) / (1 - chance) if chance < 1 else None
    return {"spearman": spearman, "kappa": kappa, "same_side": same}


def compare_toxicity(before: Floats, after: Floats, floor: float | None, resamples: int, seed: int) -> Json:
    """Return the comparison of toxicities (N, k) for eval.json.

    `floor` is the judge's mean toxicity of the civil references, None without any. `share_removed` is
    (before - after) / (before - floor), `relative` is (after - before) / before.
    """
    difference = paired_difference(before, after, resamples, seed)
    mean = before.mean()
    share_removed = None
    if floor is not None and mean > floor:
        share_removed = float(-difference.mean / (mean - floor))

    return {
        "before": toxicity_summary(before),
        "after": toxicity_summary(after),
        "floor": floor,
        "share_removed": share_removed,
        "difference": asdict(difference),
        "relative": float(difference.mean / mean) if mean > 0 else None,
        "verdict": verdict(difference),
    }


def kept_toxicity(values: Floats, floor: float | None) -> Json:
    """Return toxicities (N, k) of the initial policy for eval.json, where training kept it: nothing is compared."""
    summary = toxicity_summary(values)
    return {
        "before": summary,
        "after": summary,
        "floor": floor,
        "share_removed": None,
        "difference": None,
        "relative": None,
        "verdict": INITIAL_KEPT,
    }


def kept_metric(values: Floats) -> Json:
    """Return the mean of a metric (N, k) of the initial policy for eval.json, where training kept it."""
    mean = float(values.mean())
    return {"before": mean, "after": mean, "difference": None}


def compare(before: Floats, after: Floats, resamples: int, seed: int) -> Json:
    """Return the means of a metric (N, k) before and after, and their difference with its interval, for eval.json."""
    difference = paired_difference(before, after, resamples, seed)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": asdict(difference),
    }
