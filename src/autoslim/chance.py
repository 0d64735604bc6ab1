"""How likely a lead seen on some samples is chance: what racing decides by."""

from __future__ import annotations

import math

from torch import Tensor

FEWEST = 8  # samples before anything is decided


def chance_of_lead(differences: Tensor, before: Tensor) -> float:
    """How likely a mean lead as large as this is seen, if over the whole population (N,) there is none; at most 1.

    `differences` are those of the samples seen so far, the first n of the population; `before` is known for all of it
    and goes along with them. The mean is estimated by regression on that (Cochran, Sampling Techniques, 1977, chapter
    7), and its error follows Student's distribution, with no more degrees of freedom than the kurtosis of the residuals
    leaves to their variance: where few samples tell something, as of hits and misses, it is hardly known. And however
    alike those seen are, the ones that would undo the lead may all be among those not seen.
    """
    count, population = len(differences), len(before)
    if count < FEWEST:
        return 1.0
    seen, all_before = before[:count], float(before.mean())
    deviations = seen - seen.mean()
    scale = float(deviations.square().sum())
    slope = float(deviations @ differences) / scale if scale > 0 else 0.0
    residuals = differences - slope * seen
    mean = float(residuals.mean()) + slope * all_before
    if mean <= 0:
        return 1.0
    if count == population:
        return 0.0
    residuals = residuals - residuals.mean()
    squares = float(residuals.square().sum())
    largest = max(float(differences.abs().max()), abs(slope) * float(before.abs().max()))
    if squares <= count * (_ROUNDING * largest) ** 2:  # all as before: nothing is known of how much they may differ
        return _all_unseen(mean, largest, count, population)
    # 2 / (kurtosis - 1) for each sample, as Satterthwaite has it: n for normal ones, 2k where k of many differ
    fourths = float(residuals.square().square().sum())
    kurtosis = count * fourths / squares**2
    freedom = min(count - 2, 2 * count / max(kurtosis - 1, 1e-9))
    off = (all_before - float(seen.mean())) ** 2 / scale if scale > 0 else 0.0
    error = math.sqrt(squares / (count - 2) * (1 / count - 1 / population + off))
    unseen = _all_unseen(mean, (fourths / squares) ** 0.5, count, population)  # the size of those that count most
    return max(student_tail(mean / error, freedom), unseen)


_ROUNDING = 1e-5  # of single precision, in which what was known before is kept


def _all_unseen(lead: float, size: float, count: int, population: int) -> float:
    """How likely none of the samples is seen that take a lead in the mean away, each as much as `size`."""
    return math.exp(math.log1p(-count / population) * lead * population / size)


def student_tail(t: float, freedom: float) -> float:
    """How likely a number drawn from Student's t distribution exceeds `t`; any positive `freedom`."""
    tail = 0.5 * _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)
    return tail if t >= 0 else 1 - tail


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Abramowitz and Stegun, 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # converges fast on the other side
        return 1 - _incomplete_beta(1 - x, b, a)
    factor = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    value, c, d = 1.0, math.inf, 1.0
    for step in range(1, 2000):  # Lentz's method: c and d are ratios of neighbouring convergents
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        c, d = 1 + term / c, 1 / (1 + term * d)
        value *= c * d
        if abs(c * d - 1) < 1e-12:
            break
    return factor * value / a
