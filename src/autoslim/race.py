"""A race between the candidates of a greedy step: when it is decided who may drop out, and who does."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from autoslim.chance import chance_of_lead
from autoslim.slim import rank

_LEADERS = 3  # with how many of the best the others are compared


def looks(batches: int) -> frozenset[int]:
    """After how many batches a race decides: 1, 2, 3, 4, 6, 8, 11 ..., for each look costs all of them confidence."""
    found, count = set[int](), 1
    while count < batches:
        found.add(count)
        count += -(-count // 3)
    return frozenset(found)


def outraced(
    gained: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    confidence: float,
    looks: int,
    savings: Mapping[str, float] | None = None,
) -> list[str]:
    """The candidates that one of the best leads by more than chance explains, at one of so many looks of a step.

    `gained`: for each candidate still running, what its score is above that of the current net, for each sample seen
    so far. `before`: the same on all samples, some steps ago; candidates that are not in it stay. With `savings` losses
    are compared per cost saved. A lead is no chance at a probability of `1 - confidence` for the whole step, shared
    among its looks and those who run.
    """
    expected = {group: float(values.mean()) for group, values in gained.items()}
    for group, values in before.items():
        expected[group] += float(values.mean() - values[: len(gained[group])].mean())
    shares = dict.fromkeys(gained, 1.0) if savings is None else savings
    ranks = {
        group: rank(worth / shares[group], None if savings is None else savings[group])
        for group, worth in expected.items()
    }
    order = sorted(gained, key=lambda group: ranks[group], reverse=True)

    def chance_of(leader: str, group: str) -> float:
        is_per_cost = expected[leader] < 0  # only losses are compared per cost (see `rank`)
        one, other = (shares[leader], shares[group]) if is_per_cost else (1.0, 1.0)
        return chance_of_lead(
            gained[leader] / one - gained[group] / other, before[leader] / one - before[group] / other
        )

    limit = (1 - confidence) / (looks * max(1, len(gained) - 1))
    return [
        group
        for place, group in enumerate(order)
        if group in before
        and any(chance_of(leader, group) < limit for leader in order[: min(place, _LEADERS)] if leader in before)
    ]
