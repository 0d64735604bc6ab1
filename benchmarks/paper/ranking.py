"""Do two measurements put nets in the same order?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import mean


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Correlation of the ranks; equal values share the mean of theirs."""
    a, b = (_ranks(values) for values in (xs, ys))
    a, b = [x - mean(a) for x in a], [y - mean(b) for y in b]
    scale = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else 0.0


def kendall(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Kendall's tau-b: pairs in the same order less pairs in the opposite one, of those without ties."""
    signs = [(_sign(x - v), _sign(y - w)) for (x, y), (v, w) in combinations(list(zip(xs, ys, strict=True)), 2)]
    scale = (sum(x * x for x, _ in signs) * sum(y * y for _, y in signs)) ** 0.5
    return sum(x * y for x, y in signs) / scale if scale else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
