"""At which temperature is the initial policy as sharp as the trained one?

Training may make a policy less toxic by making it surer of what it says anyway. The control is the initial policy at
the temperature that gives it the entropy of the trained one.
"""

from collections.abc import Callable
from typing import NamedTuple

SHARPENED = "sharpened"
"""The name of the control in results."""
_MOST_PASSES = 5
# The search ends once the error of the entropy is this share of the entropy and of its fall. A few dozen responses
# tell it no better.
_TOLERANCE = 0.05
# A temperature of 0 would divide by 0; at this share of the initial one nearly all draws are the likeliest token.
_COLDEST = 0.01


class Sharpening(NamedTuple):
    """The temperature of the control, or why there is none."""

    temperature: float | None
    left_out: str | None


def matching_temperature(
    entropy_at: Callable[[float], float], start: float, start_entropy: float, target: float
) -> float:
    """Return the temperature up to `start` at which the entropy is `target`, by at most 5 calls of `entropy_at`.

    `start_entropy` is the entropy at `start`; all are in nats per token. The first temperature is half of `start`,
    because the entropy of a language model may rise steeply towards `start`. Then follows false position with the
    Illinois step (Dowell and Jarratt 1971, BIT 11). Its lower end is temperature 0, at which every draw is the
    likeliest token and the entropy is 0. Of the temperatures tried, the closest is returned. All have four significant
    digits.
    """
    if target >= start_entropy:
        return _rounded(start)

    cold, cold_error = 0.0, -target
    hot, hot_error = start, start_entropy - target
    tolerance = _TOLERANCE * min(target, start_entropy - target)
    errors: dict[float, float] = {}
    moved_before = ""
    while len(errors) < _MOST_PASSES:
        next_temperature = start / 2
        if errors:
            next_temperature = (cold * hot_error - hot * cold_error) / (hot_error - cold_error)
        temperature = _rounded(max(next_temperature, _COLDEST * start))
        if temperature in errors:
            break

        error = entropy_at(temperature) - target
        errors[temperature] = error
        if abs(error) <= tolerance:
            break

        # An end that stays twice would hold the next crossing back, so its error is halved.
        moves = "hot" if error > 0 else "cold"
        if moves == "hot":
            hot, hot_error = temperature, error
            cold_error = cold_error / 2 if moved_before == moves else cold_error
        else:
            cold, cold_error = temperature, error
            hot_error = hot_error / 2 if moved_before == moves else hot_error
        moved_before = moves

    return min(errors, key=lambda temperature: abs(errors[temperature]))


def _rounded(temperature: float) -> float:
    """Return a temperature that responses.jsonl, which keeps six digits, does not change."""
    return float(f"{temperature:.4g}")
