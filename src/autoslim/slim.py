"""The greedy search (AutoSlim, section 3.3), for any judge and any cost. It knows no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from autoslim.cost import Budget, Cost
from autoslim.errors import BudgetError
from autoslim.space import ChannelSpace, SlimStep, Widths

Judge = Callable[[Widths], float]


def greedy_slim(
    space: ChannelSpace,
    judge: Judge,
    cost: Cost,
    budgets: Iterable[float | str],
    *,
    start: Widths | None = None,
    on_candidate: Callable[[str, float], None] | None = None,
) -> Iterator[SlimStep]:
    """Take the bin away that hurts least, again and again, until the lowest budget is met; yields every step.

    At each step every group is tried one choice lower; the candidate with the highest `judge` score is kept, the first
    group in the order of the space among equals. A budget is a number in the unit of `cost`, or text such as "50%"; it
    is met by the first step whose cost is at most that. One pass meets them all. `start` continues from the widths of a
    step yielded before. `on_candidate(group, score)` is told of every evaluation.

    Raises `BudgetError` at once, naming the smallest cost within reach, if a budget cannot be met.
    """
    limits = [
        (Budget.parse(b) if isinstance(b, str) else Budget(f"{b:g}", "macs", b, False)).limit(cost, space)
        for b in budgets
    ]
    if not limits:
        raise BudgetError("no budget was given; write for example 50%")
    return _steps(space, judge, cost, min(limits), start or space.full(), on_candidate or (lambda group, score: None))


def _steps(
    space: ChannelSpace,
    judge: Judge,
    cost: Cost,
    limit: float,
    widths: Widths,
    on_candidate: Callable[[str, float], None],
) -> Iterator[SlimStep]:
    while cost(widths) > limit:
        best: SlimStep | None = None
        for group in space.groups:
            candidate = space.narrowed(widths, group)
            if candidate is None:
                continue
            score = judge(candidate)
            on_candidate(group, score)
            # a score that is not a number never wins, unless there is no other
            if best is None or score > best.score or (best.score != best.score and score == score):
                best = SlimStep(group, candidate, cost(candidate), score)
        assert best is not None, "the smallest net meets the budget: that was checked before the search"
        widths = best.widths
        yield best


def widths_within(space: ChannelSpace, steps: Iterable[SlimStep], cost: Cost, limit: float) -> Widths | None:
    """The widest net on a greedy path that costs at most `limit`; None if the path does not reach that far."""
    if cost(space.full()) <= limit:
        return space.full()
    return next((step.widths for step in steps if cost(step.widths) <= limit), None)


def uniform_like(space: ChannelSpace, cost: Cost, target: float) -> tuple[float, Widths]:
    """The uniform width ratio whose cost is nearest to `target`, and its widths."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(space.uniform(middle)) <= target else (low, middle)
    candidates = [ratio for ratio in (low, high) if ratio > 0]
    ratio = min(candidates, key=lambda r: abs(cost(space.uniform(r)) - target))
    return ratio, space.uniform(ratio)
