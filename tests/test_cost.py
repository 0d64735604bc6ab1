"""What a budget says of costs that no net can be cut by, and of limits that the full net meets already."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from autoslim import ChannelGroup, ChannelSpace, resolve_budget
from autoslim.cost import Budget
from autoslim.errors import BudgetError

SPACE = ChannelSpace([ChannelGroup(name, 10, tuple(range(1, 11))) for name in ("a", "b")])


def total(widths: Mapping[str, int]) -> float:
    return float(sum(widths.values()))


def first(widths: Mapping[str, int]) -> float:
    return float(widths["a"])


COSTS = {"macs": total, "params": first}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100%", "is that of the full net, which has 20: there is nothing to cut"),
        ("1x", "is that of the full net, which has 20"),
        ("macs<=20", "is that of the full net"),
        ("macs<=21", "is above the full net, which has 20"),
        ("params<=100%, macs<=2G", "the full net is within all of its limits"),
        ("macs<=100%, params<=100%", "the full net is within all of its limits"),
    ],
)
def test_a_budget_that_the_full_net_meets_already_is_refused(text: str, expected: str) -> None:
    with pytest.raises(BudgetError, match=expected):
        resolve_budget(text, SPACE, COSTS)


def test_one_of_several_limits_may_be_met_already() -> None:
    joint, limit = resolve_budget("macs<=100%, params<=50%", SPACE, COSTS)
    assert (joint(SPACE.full()), limit) == (2.0, 1.0)


@pytest.mark.parametrize("full", [0.0, -3.0, float("inf")])
@pytest.mark.parametrize("text", ["50%", "7"])
def test_a_cost_that_no_share_can_be_taken_of_is_named(full: float, text: str) -> None:
    with pytest.raises(BudgetError, match=f"the cost of the full net is {full:g}; budgets need one above 0"):
        Budget.parse(text).limit(lambda widths: full + 20 - total(widths), SPACE)
