"""The greedy search (AutoSlim, section 3.3), for any judge and any cost. It knows no model and no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from autoslim.cost import METRICS, Budget, Cost, check_cost, check_metric, counted_by, number_of
from autoslim.errors import BudgetError, ConfigError, nearest
from autoslim.space import ChannelSpace, SlimStep, Widths, a_space, as_number, as_widths, check_whole

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

    The cost must be a function of widths that does not rise as they shrink. Raises `BudgetError` at once, naming the
    cost of the smallest net, if that does not meet a budget, and at the step where it happens if the cost is no number;
    `ConfigError` at the step where no score is one. A score that is not a number never wins over one that is.
    """
    a_space(space)
    _check_judge(judge)
    check_cost(cost)
    limits = [_limit(budget, cost, space) for budget in _listed(budgets)]
    if not limits:
        raise BudgetError("no budget was given; write for example 50%")
    if rule not in RULES:
        raise BudgetError(f"no rule {rule!r} for greedy steps; {nearest(str(rule), RULES)}")
    on_candidate = on_candidate or (lambda group, score: None)
    numbers = partial(number_of, cost)
    begin = space.full() if start is None else as_widths(start)
    space.check(begin)
    return _steps(space, judge, numbers, min(limits), begin, on_candidate, rule)


def _check_judge(judge: object) -> None:
    if not (callable(judge) or hasattr(judge, "compare")) or isinstance(judge, type):
        raise ConfigError(
            f"judge {judge!r} cannot be asked; give RacingJudge(supernet, batches), ReuseJudge or Judge likewise, or "
            "any callable Widths -> float"
        )


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
        budget = _amount(budget)
        return Budget(f"{budget:g}", "macs", budget, False).limit(cost, space)
    return _budget(budget, cost).limit(cost, space)


def _amount(budget: Any) -> float:
    amount = as_number(budget)
    if math.isnan(amount):
        raise BudgetError(
            f"budget {budget!r} is no number; give a number in the unit of the cost, or text such as '50%'"
        )
    return amount


def _budget(budget: str, cost: Cost) -> Budget:
    """What a text asks of one cost."""
    several = Budget.parse_all(budget, None if counted_by(cost) is None else METRICS)
    if len(several) > 1:
        raise BudgetError(
            f"budget {budget!r} has several limits, and the cost given is one; "
            "cost, limit = resolve_budget(text, space, costs) makes one cost of them"
        )
    check_metric(several[0], cost)
    return several[0]


def _within(limit: float | str, cost: Cost, space: ChannelSpace) -> float:
    """A limit to compare costs with, which the full net may meet; out of reach is a matter of the net found."""
    a_space(space)
    check_cost(cost)
    if isinstance(limit, str):
        return _budget(limit, cost).limit(cost, space, may_be_slack=True)
    return _amount(limit)


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
        if not candidates:  # the smallest net met it before the search
            raise BudgetError(
                f"the cost of the smallest net is {cost(widths):g} now and was at most {limit:g} before: a cost must "
                "give the same number for the same widths"
            )
        found = _compared(judge, widths, candidates, savings, on_candidate, now)
        assert found, "a judge compares at least one candidate"
        best = max(found, key=lambda group: rank(found[group][1], None if savings is None else savings[group]))
        if math.isnan(found[best][1]):
            raise ConfigError(
                f"no candidate of this step has a score that is a number: of {best!r} at width "
                f"{candidates[best][best]} it is {found[best][0]}; look for such values in the weights and the images"
            )
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
        now = _score(judge, widths)
    for group, candidate in candidates.items():
        score = _score(judge, candidate)
        on_candidate(group, score)
        found[group] = score, score if savings is None or now is None else (score - now) / savings[group]
    return found


def _score(judge: Judge, widths: Widths) -> float:
    """What a user's callable says of a net; `ConfigError` if it is no number, nor what came of computing one."""
    value: Any = judge(widths)
    score = as_number(value)
    if math.isnan(score) and value == value:  # only a result that is not a number differs from itself
        raise ConfigError(f"a judge must give a number for widths; this one gave {value!r} for {dict(widths)}")
    return score


@dataclass(frozen=True)
class Exchange:
    """Channels moved from one group to another (None: the budget had room for them as it was)."""

    wider: str
    narrower: str | None
    widths: Widths
    cost: float
    score: float


def exchange_bins(
    space: ChannelSpace, judge: Judge, cost: Cost, widths: Mapping[str, int], limit: float | str, *, tried: int = 3
) -> Iterator[Exchange]:
    """Mend what a greedy search found: move a bin from one group to another while the score rises and `limit` holds.

    At each step every group is tried one choice wider; for the `tried` best of them, every other group is made as much
    narrower as `limit` asks. The best exchange is made if its score exceeds that of the net as it is. This is a local
    search after the search of the paper, which only ever removes. `limit` is a number or text, as in `greedy_slim`.
    """
    most = _within(limit, cost, space)
    _check_judge(judge)
    check_whole(ConfigError, tried=tried)
    space.check(widths)
    return _exchanges(space, partial(_score, judge), partial(number_of, cost), as_widths(widths), most, tried)


def _exchanges(
    space: ChannelSpace, judge: Judge, cost: Cost, widths: Widths, limit: float, tried: int
) -> Iterator[Exchange]:
    score = judge(widths)
    if math.isnan(score):
        raise ConfigError(f"the score of the net to be mended is not a number: {dict(widths)}")
    while True:
        wider = {group: candidate for group in space.groups if (candidate := space.widened(widths, group)) is not None}
        gain = {group: judge(candidate) for group, candidate in wider.items()}
        exchanges = []
        for group in sorted(gain, key=lambda group: rank(gain[group], None), reverse=True)[:tried]:
            if cost(wider[group]) <= limit:
                exchanges.append(Exchange(group, None, wider[group], cost(wider[group]), gain[group]))
                continue
            for other in space.groups:
                candidate = _narrowed_until(space, cost, wider[group], other, limit) if other != group else None
                if candidate is not None:
                    exchanges.append(Exchange(group, other, candidate, cost(candidate), judge(candidate)))
        best = max(exchanges, key=lambda exchange: rank(exchange.score, None), default=None)
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


def widths_within(space: ChannelSpace, steps: Iterable[SlimStep], cost: Cost, limit: float | str) -> Widths | None:
    """The widest net on a greedy path that costs at most `limit` (as in `greedy_slim`); None if it ends before that."""
    limit = _within(limit, cost, space)
    if cost(space.full()) <= limit:
        return space.full()
    return next((step.widths for step in steps if cost(step.widths) <= limit), None)


def uniform_like(space: ChannelSpace, cost: Cost, target: float | str) -> tuple[float, Widths]:
    """The uniform width ratio whose cost is nearest to `target` (as a limit of `greedy_slim`), and its widths."""
    target = _within(target, cost, space)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(space.uniform(middle)) <= target else (low, middle)
    candidates = [ratio for ratio in (low, high) if ratio > 0]
    ratio = min(candidates, key=lambda r: abs(cost(space.uniform(r)) - target))
    return ratio, space.uniform(ratio)
