"""The greedy search (AutoSlim, section 3.3), for any judge and any cost. It knows no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from autoslim.cost import METRICS, Budget, Cost, check_metric, counted_by, number_of
from autoslim.errors import BudgetError, ConfigError, nearest
from autoslim.space import ChannelSpace, SlimStep, Widths

Judge = Callable[[Widths], float]
RULES = ("score", "score-per-cost")


def greedy_slim(
    space: ChannelSpace,
    judge: Judge,
    cost: Cost,
    budgets: Iterable[float | str] | float | str,
    *,
    rule: str = "score",
    start: Mapping[str, int] | None = None,
    on_candidate: Callable[[str, float], None] | None = None,
) -> Iterator[SlimStep]:
    """Take the bin away that hurts least, again and again, until the lowest budget is met; yields every step.

    At each step every group is tried one choice lower; the candidate with the highest `judge` score is kept, the first
    group in the order of the space among equals. A budget is a number in the unit of `cost`, or text such as "50%"; it
    is met by the first step whose cost is at most that. One pass meets them all. `start` continues from the widths of a
    step yielded before. `on_candidate(group, score)` is told of every evaluation. A judge with a method `compare` is
    asked for all candidates of a step at once: `ReuseJudge` and `RacingJudge` are many times faster than `Judge`.

    `rule="score-per-cost"` keeps the candidate that loses least score per cost it saves instead, as NetAdapt (Yang et
    al. 2018) makes the candidates of a step comparable; of those that lose nothing, the one that gains most, and then
    the one that saves most. The paper looks at the score alone.

    Raises `BudgetError` at once, naming the smallest cost within reach, if a budget cannot be met, and at the step
    where it happens if the cost is no number.
    """
    if not callable(judge) and not hasattr(judge, "compare"):
        raise ConfigError(
            f"judge {judge!r} cannot be asked; give RacingJudge(supernet, batches), ReuseJudge or Judge likewise, or "
            "any callable Widths -> float"
        )
    if not callable(cost):
        raise ConfigError(f"cost {cost!r} cannot be asked; give MacCost(space) or any callable Widths -> float")
    limits = [_limit(budget, cost, space) for budget in _listed(budgets)]
    if not limits:
        raise BudgetError("no budget was given; write for example 50%")
    if rule not in RULES:
        raise BudgetError(f"no rule {rule!r} for greedy steps; {nearest(rule, RULES)}")
    on_candidate = on_candidate or (lambda group, score: None)
    numbers = partial(number_of, cost)
    begin = space.full() if start is None else Widths(start)
    space.check(begin)
    return _steps(space, judge, numbers, min(limits), begin, on_candidate, rule)


def _listed(budgets: Any) -> list[Any]:
    """One budget is a list of one; numbers of numpy and torch cannot be told from lists by their type."""
    if budgets is None or isinstance(budgets, str):
        return [] if budgets is None else [budgets]
    try:
        return list(budgets)
    except TypeError:
        return [budgets]


def _limit(budget: Any, cost: Cost, space: ChannelSpace) -> float:
    if not isinstance(budget, str):
        try:
            budget = float(budget)  # of numpy and torch too
        except (TypeError, ValueError, RuntimeError):
            raise BudgetError(
                f"budget {budget!r} is none; give a number in the unit of the cost, or text such as '50%'"
            ) from None
        return Budget(f"{budget:g}", "macs", budget, False).limit(cost, space)
    several = Budget.parse_all(budget, None if counted_by(cost) is None else METRICS)
    if len(several) > 1:
        raise BudgetError(
            f"budget {budget!r} has several limits, and the cost given is one; "
            "cost, limit = resolve_budget(text, space, costs) makes one cost of them"
        )
    check_metric(several[0], cost)
    return several[0].limit(cost, space)


def _steps(
    space: ChannelSpace,
    judge: Judge,
    cost: Cost,
    limit: float,
    widths: Widths,
    on_candidate: Callable[[str, float], None],
    rule: str,
) -> Iterator[SlimStep]:
    now: float | None = None  # the score of `widths`, once it is known
    while cost(widths) > limit:
        candidates = {
            group: narrowed for group in space.groups if (narrowed := space.narrowed(widths, group)) is not None
        }
        savings: dict[str, float] | None = None
        if rule == "score-per-cost":
            whole = cost(widths)
            savings = {group: max(whole - cost(each), 1e-12) for group, each in candidates.items()}
        found = _compared(judge, widths, candidates, savings, on_candidate, now)
        assert found, "the smallest net meets the budget: that was checked before the search"
        best = max(found, key=lambda group: rank(found[group][1], None if savings is None else savings[group]))
        widths, now = candidates[best], found[best][0]
        yield SlimStep(best, widths, cost(widths), now)


def rank(worth: float, saving: float | None) -> tuple[bool, float, float, float]:
    """What a candidate is chosen by, the highest first. One whose worth is not a number never wins over another.

    Per cost saved only losses can be compared: of candidates that lose nothing, the one that gains most is the best,
    and of equal gains the one that saves most. A gain per cost would go to whoever saves least.
    """
    if saving is None or not worth >= 0:
        return worth == worth, 0.0, worth, 0.0
    return True, 1.0, worth * saving, saving


def _compared(
    judge: Judge,
    widths: Widths,
    candidates: Mapping[str, Widths],
    savings: Mapping[str, float] | None,
    on_candidate: Callable[[str, float], None],
    now: float | None,
) -> Mapping[str, tuple[float, float]]:
    """Score and worth of candidates, in their order; a judge that can do that for a whole step at once does it."""
    compare = getattr(judge, "compare", None)
    if compare is not None:
        return compare(widths, candidates, savings, on_candidate)  # type: ignore[no-any-return]
    found = {}
    if savings is not None and now is None:
        now = judge(widths)
    for group, candidate in candidates.items():
        score = judge(candidate)
        on_candidate(group, score)
        found[group] = score, score if savings is None or now is None else (score - now) / savings[group]
    return found


@dataclass(frozen=True)
class Exchange:
    """Channels moved from one group to another (None: the budget had room for them as it was)."""

    wider: str
    narrower: str | None
    widths: Widths
    cost: float
    score: float


def exchange_bins(
    space: ChannelSpace, judge: Judge, cost: Cost, widths: Widths, limit: float, *, tried: int = 3
) -> Iterator[Exchange]:
    """Mend what a greedy search found: move a bin from one group to another while the score rises and `limit` holds.

    At each step every group is tried one choice wider; for the `tried` best of them, every other group is made as much
    narrower as `limit` asks. The best exchange is made if its score exceeds that of the net as it is. This is a local
    search after the search of the paper, which only ever removes.
    """
    score = judge(widths)
    while True:
        wider = {group: candidate for group in space.groups if (candidate := space.widened(widths, group)) is not None}
        gain = {group: judge(candidate) for group, candidate in wider.items()}
        exchanges = []
        for group in sorted(gain, key=lambda group: -gain[group])[:tried]:
            if cost(wider[group]) <= limit:
                exchanges.append(Exchange(group, None, wider[group], cost(wider[group]), gain[group]))
                continue
            for other in space.groups:
                candidate = _narrowed_until(space, cost, wider[group], other, limit) if other != group else None
                if candidate is not None:
                    exchanges.append(Exchange(group, other, candidate, cost(candidate), judge(candidate)))
        best = max(exchanges, key=lambda exchange: exchange.score, default=None)
        if best is None or not best.score > score:
            return
        widths, score = best.widths, best.score
        yield best


def _narrowed_until(space: ChannelSpace, cost: Cost, widths: Widths, group: str, limit: float) -> Widths | None:
    """`widths` with one group narrowed until they cost at most `limit`; None if that does not suffice."""
    candidate: Widths | None = widths
    while candidate is not None and cost(candidate) > limit:
        candidate = space.narrowed(candidate, group)
    return candidate


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
