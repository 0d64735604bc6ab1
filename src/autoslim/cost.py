"""What widths cost, in closed form from the trace: no forward pass, no torch. And budgets, as users write them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod

from autoslim.errors import BudgetError, ConfigError, SpaceError, nearest
from autoslim.space import Axis, ChannelSpace, a_space, as_number, check_whole

Cost = Callable[[Mapping[str, int]], float]


class _Sizes:
    """For each term, `scale` times the kept sizes of its axes; each distinct axis is measured once per call."""

    def __init__(self, terms: Iterable[tuple[int, tuple[Axis, ...]]]) -> None:
        index: dict[Axis, int] = {}
        self._terms = [(scale, tuple(index.setdefault(axis, len(index)) for axis in axes)) for scale, axes in terms]
        self._axes = list(index)

    def __call__(self, widths: Mapping[str, int]) -> list[int]:
        kept = [axis.kept(widths) for axis in self._axes]
        return [scale * prod([kept[i] for i in follows]) for scale, follows in self._terms]


class _Products:
    """A sum of `scale` times the kept sizes of some axes of a space, at any widths up to the sizes of its groups."""

    def __init__(self, space: ChannelSpace, terms: Iterable[tuple[int, tuple[Axis, ...]]]) -> None:
        self._space = space
        self._constant = 0
        follows = []
        for scale, axes in terms:
            scale *= prod(axis.size for axis in axes if not axis.groups)
            cuttable = tuple(axis for axis in axes if axis.groups)
            if cuttable:
                follows.append((scale, cuttable))
            else:
                self._constant += scale
        self._sizes = _Sizes(follows)

    def __call__(self, widths: Mapping[str, int]) -> int:
        self._space.check_sizes(widths)
        return self._constant + sum(self._sizes(widths))


class MacCost:
    """Multiply-accumulates of convolutions, linear layers and matrix products, for one forward on the example input.

    Equals half of what `torch.utils.flop_counter.FlopCounterMode` counts for the extracted net. The papers call it
    FLOPs. Biases, normalisation and activations are not counted.
    """

    unit = "MACs"

    def __init__(self, space: ChannelSpace) -> None:
        self._sum = _Products(space, ((op.scale, op.factors) for op in a_space(space).operations))

    def __call__(self, widths: Mapping[str, int]) -> float:
        """MACs of the net of these widths."""
        return self._sum(widths)


class ParamCost:
    """Number of parameter elements; shared parameters count once."""

    unit = "parameters"

    def __init__(self, space: ChannelSpace) -> None:
        self._sum = _Products(space, ((1, axes) for axes in a_space(space).parameters.values()))

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Parameters of the net of these widths."""
        return self._sum(widths)


class MemoryCost:
    """The "memory" of the AutoSlim paper: parameters plus the elements of all convolution and linear outputs."""

    unit = "elements"

    def __init__(self, space: ChannelSpace) -> None:
        outputs = ((op.output_scale, op.outputs) for op in a_space(space).operations if op.kind != "matmul")
        self._sum = _Products(space, [*outputs, *((1, axes) for axes in space.parameters.values())])

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Elements of the net of these widths."""
        return self._sum(widths)


class PeakMemoryCost:
    """Bytes of the weights and buffers and of the activations alive at the worst moment of a forward pass.

    The example input is held throughout, and every other activation as long as the model's own code holds it in
    evaluation mode, under `no_grad`: what was recorded while tracing. Every element counts `element_bytes`, 4 as in
    float32. What kernels allocate while they run is not counted. Raises `SpaceError` if the space has no lifetimes.
    """

    unit = "bytes"

    def __init__(self, space: ChannelSpace, element_bytes: int = 4) -> None:
        if not a_space(space).activations:
            raise SpaceError("how long activations live is not known in this space; trace the model again")
        check_whole(ConfigError, element_bytes=element_bytes)
        self._element_bytes = element_bytes
        tensors = (*space.parameters.values(), *space.buffers.values())
        self._weights = _Products(space, ((1, axes) for axes in tensors))
        sizes: dict[tuple[int, tuple[Axis, ...]], int] = {}
        events: dict[int, dict[int, int]] = {}  # at each operator: how many more of each size are alive
        for each in space.activations:
            size = sizes.setdefault((each.scale, each.axes), len(sizes))
            for moment, count in ((each.first, 1), (each.last + 1, -1)):
                changes = events.setdefault(moment, {})
                changes[size] = changes.get(size, 0) + count
        self._sizes = _Sizes(sizes)
        self._events = [list(events[moment].items()) for moment in sorted(events)]

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Bytes of the net of these widths."""
        weights, sizes = self._weights(widths), self._sizes(widths)
        alive = peak = 0
        for changes in self._events:
            alive += sum(count * sizes[size] for size, count in changes)
            peak = max(peak, alive)
        return self._element_bytes * (weights + peak)


class JointCost:
    """Several limits that must hold at once, as one cost: the share that a net takes of the limit that binds.

    `limits` are (cost, limit) pairs; a net meets all of them when this is at most 1. A greedy step with
    `rule="score-per-cost"` then weighs accuracy against the constraint that binds, whichever it is at that point.
    """

    unit = "of the limit that binds"

    def __init__(self, limits: Iterable[tuple[Cost, float]]) -> None:
        pairs = list(limits) if isinstance(limits, Iterable) else [limits]
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not as_number(pair[1]) > 0:
                raise BudgetError(f"a joint cost needs (cost, limit) pairs with limits above 0, got {pair!r}")
            check_cost(pair[0])
        if not pairs:
            raise BudgetError("a joint cost needs at least one limit")
        self._limits = pairs

    def __call__(self, widths: Mapping[str, int]) -> float:
        """The largest of cost / limit."""
        return max(number_of(cost, widths) / limit for cost, limit in self._limits)


COSTS: dict[str, Callable[[ChannelSpace], Cost]] = {
    "macs": MacCost,
    "params": ParamCost,
    "memory": MemoryCost,
    "peak_memory": PeakMemoryCost,
}


def costs_of(space: ChannelSpace) -> dict[str, Cost]:
    """Every cost that follows from the space, by its metric: `peak_memory` only if lifetimes are known."""
    return {name: make(space) for name, make in COSTS.items() if name != "peak_memory" or space.activations}


LATENCY = "latency_ms"  # measured, and so no function of the space alone
METRICS = (*COSTS, LATENCY)


def figures_of(costs: Mapping[str, Cost], widths: Mapping[str, int]) -> dict[str, float]:
    """What widths cost, as files say it: whole numbers by metric, and `latency_predicted_ms`."""
    figures: dict[str, float] = {name: int(cost(widths)) for name, cost in costs.items() if name != LATENCY}
    if LATENCY in costs:
        figures["latency_predicted_ms"] = round(costs[LATENCY](widths), 4)
    return figures


def slimmable_share(space: ChannelSpace) -> float:
    """Share of the MACs of convolutions and linear layers whose output channels can be cut."""
    full = space.full()
    macs = {True: 0, False: 0}
    for op in space.operations:
        if op.kind != "matmul":
            macs[op.is_cuttable] += _Products(space, [(op.scale, op.factors)])(full)
    return macs[True] / max(1, macs[True] + macs[False])


@dataclass(frozen=True)
class Budget:
    """A limit on one metric: an amount, or a share of the full net's cost."""

    text: str
    metric: str
    amount: float
    is_share: bool

    @property
    def meaning(self) -> tuple[str, float, bool]:
        """The same for every way to write a limit: 50%, 0.5x and macs <= 50%."""
        return self.metric, float(f"{self.amount:.9g}"), self.is_share

    @classmethod
    def parse(cls, text: str, metrics: Iterable[str] | None = METRICS) -> Budget:
        """Read `300M`, `0.5x`, `50%`, or one with its metric: `params=4M`, `memory<=30%`; `flops` means `macs`.

        `metrics` are those that there are; None if any name may be one. Raises `BudgetError` with what would work.
        """
        text = str(text).strip()
        match = re.fullmatch(r"(?:([^<>=:≤≥]+?)\s*(<=|≤|=|:|<)\s*)?([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)", text)
        if match is None:
            other = re.fullmatch(r"([A-Za-z_ -]+?)\s*(>|>=|≥|==|=<|<==)\s*([0-9.].*)", text)
            meant = f"{other.group(1)}<={other.group(3)}: a budget is an upper limit" if other else ""
            raise BudgetError(
                f"cannot read the budget {text!r}; write {meant or '300M, 0.5x or 50%, or params=4M, latency_ms<=8'}"
            )
        metric, number, unit = (match.group(1) or "macs").strip().lower(), match.group(3), match.group(4)
        metric = re.sub(r"[\s-]+", "_", metric)
        metric = {"flops": "macs"}.get(metric, metric)
        if metrics is not None:
            known = {re.sub(r"[\s-]+", "_", name.lower()): name for name in metrics}
            if metric not in known:
                raise BudgetError(
                    f"budget {text!r}: no metric {metric!r}; {nearest(metric, [*known.values(), 'flops'])}"
                )
            metric = known[metric]
        scale, is_share = _scale(text, metric, unit)
        try:
            amount = float(number) * scale
        except ValueError:
            raise BudgetError(f"budget {text!r}: {number!r} is no number") from None
        if amount <= 0 or (is_share and amount > 1):
            raise BudgetError(f"budget {text!r}: a share lies above 0 and at most at 1x (100%), an amount above 0")
        return cls(text, metric, amount, is_share)

    @classmethod
    def parse_all(cls, text: str, metrics: Iterable[str] | None = METRICS) -> tuple[Budget, ...]:
        """Read one entry of a list of budgets: a limit, or several that must hold at once, `macs<=50%, params<=2M`."""
        if re.search(r"\d\s*,\s*\d", str(text)):
            raise BudgetError(
                f"cannot read the budget {str(text)!r}: commas separate limits, as in 'macs<=50%, params<=2M'; write "
                "an amount without them (1000000, 1M), and each limit after the first with its metric"
            )
        parts = str(text).split(",")
        if len(parts) > 1 and not all(part.strip() for part in parts):
            raise BudgetError(f"cannot read the budget {str(text)!r}: nothing stands beside one of its commas")
        budgets = tuple(cls.parse(part, metrics) for part in parts)
        limited = [budget.metric for budget in budgets]
        for metric in limited:
            if limited.count(metric) > 1:
                raise BudgetError(f"budget {str(text)!r} limits {metric!r} twice; keep the lower of the two")
        return budgets

    def limit(self, cost: Cost, space: ChannelSpace, *, may_be_slack: bool = False) -> float:
        """The budget as a number of the metric's unit.

        Raises `BudgetError` if the smallest net is not within it, or the full net already is, unless that may be.
        """
        most, least = number_of(cost, space.full()), number_of(cost, space.smallest())
        if not 0 < most < math.inf:
            raise BudgetError(f"budget {self.text!r}: the cost of the full net is {most:g}; budgets need one above 0")
        limit = self.amount * most if self.is_share else self.amount
        unit = getattr(cost, "unit", "")
        if math.isnan(limit):
            raise BudgetError(f"budget {self.text!r} is no number; write an amount, or a share such as 50%")
        if limit < least and unit == "ms" and least >= most:
            raise BudgetError(
                f"budget {self.text!r} ({readable(limit)} ms) cannot be reached: the smallest net takes "
                f"{readable(least)} ms, the full net {readable(most)} ms: the measurement was disturbed, or latency "
                "does not depend on widths here; measure anew while the machine does nothing else (autoslim latency "
                "MODEL_OR_CONFIG --fresh), or choose a budget on macs"
            )
        if limit < least:
            raise BudgetError(
                f"budget {self.text!r} ({readable(limit)} {unit}) cannot be reached: the smallest net of this space "
                f"has {readable(least)} ({least / most:.1%}); {self._share_meant(unit)}allow smaller widths "
                "(min_ratio, divisor) or raise it"
            )
        if limit >= most and not may_be_slack:
            where = "above" if limit > most else "that of"
            raise BudgetError(
                f"budget {self.text!r} ({readable(limit)} {unit}) is {where} the full net, which has {readable(most)}: "
                "there is nothing to cut; ask for less"
            )
        return limit

    def _share_meant(self, unit: str) -> str:
        """Nobody wants a net of 50 multiply-accumulates."""
        bare = re.fullmatch(r"(?:.*[=:≤<])?\s*([0-9.]+)", self.text)
        if bare is None or unit not in _COUNTED or self.amount > 100:
            return ""
        return f"did you mean {bare.group(1)}{'x' if self.amount <= 1 else '%'}? If not, "


_COUNTED = ("MACs", "parameters", "elements", "bytes")


def check_cost(cost: object) -> None:
    """`ConfigError` for what cannot be asked what widths cost, such as the class of a cost."""
    if not callable(cost) or isinstance(cost, type):
        raise ConfigError(f"cost {cost!r} cannot be asked; give MacCost(space) or any callable Widths -> float")


def number_of(cost: Cost, widths: Mapping[str, int]) -> float:
    """What a user's callable says of some widths; `BudgetError` if it is no number."""
    value = cost(widths)
    number = as_number(value)
    if math.isnan(number):
        raise BudgetError(f"a cost must give a number for widths; this one gave {value!r} for {dict(widths)}")
    return number


def _scale(text: str, metric: str, unit: str) -> tuple[float, bool]:
    """What a unit multiplies an amount of a metric by, and whether it makes it a share."""
    shares = {"x": 1.0, "%": 0.01}
    if unit.lower() in shares:
        return shares[unit.lower()], True
    if metric == LATENCY:
        if unit.lower() in ("", "ms"):
            return 1.0, False
        raise BudgetError(
            f"budget {text!r}: no unit {unit!r} of time; {LATENCY} is in milliseconds: write {LATENCY}<=8, or x or % "
            "for a share"
        )
    multiples = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
    in_bytes = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30}
    if metric == "peak_memory":
        multiples |= in_bytes
    if unit.upper() not in multiples:
        amounts = "KB, MB or MiB" if metric == "peak_memory" else "K, M or G"
        hint = f"; bytes are those of peak_memory<=1.5{unit}" if unit.upper() in in_bytes else ""
        raise BudgetError(f"budget {text!r}: no unit {unit!r}; use {amounts} for an amount, x or % for a share{hint}")
    return multiples[unit.upper()], False


def counted_by(cost: Cost) -> str | None:
    """The metric that a cost of ours counts; None for a user's own callable, of which that is not known."""
    kinds = {metric: kind for metric, kind in COSTS.items() if isinstance(kind, type)}
    ours = LATENCY if getattr(cost, "unit", "") == "ms" else None
    return next((metric for metric, kind in kinds.items() if isinstance(cost, kind)), ours)


def check_metric(budget: Budget, cost: Cost) -> None:
    """`BudgetError` if a budget names another metric than the one that a cost of ours counts."""
    named = budget.metric if re.search("[=:≤<]", budget.text) else None
    counted = counted_by(cost)
    if named is not None and counted is not None and named != counted:
        raise BudgetError(
            f"budget {budget.text!r} is on {named} and the cost given counts {counted}; give the cost of {named}, or "
            f"write {counted}<=..."
        )


def resolve_budget(text: str, space: ChannelSpace, costs: Mapping[str, Cost]) -> tuple[Cost, float]:
    """The cost and the limit that a budget stands for, as `greedy_slim` takes them.

    `costs` by metric, as `{"macs": MacCost(space)}`; names of your own are metrics too. Several limits in one text
    (`macs<=50%, latency_ms<=8`) give a `JointCost` and the limit 1. Raises `BudgetError` if one cannot be reached, or
    if the full net meets them all.
    """
    a_space(space)
    if not isinstance(costs, Mapping):
        raise BudgetError(f'costs go by their metric, as {{"macs": MacCost(space)}}, got a {type(costs).__name__}')
    limits: list[tuple[Cost, float]] = []
    budgets = Budget.parse_all(text, {**dict.fromkeys(METRICS), **costs})
    for budget in budgets:
        if budget.metric not in costs:
            raise BudgetError(f"budget {budget.text!r}: there is no cost for {budget.metric!r} here")
        cost = costs[budget.metric]
        limits.append((cost, budget.limit(cost, space, may_be_slack=len(budgets) > 1)))
    if len(limits) == 1:
        return limits[0]
    joint = JointCost(limits)
    if joint(space.full()) <= 1:
        raise BudgetError(f"budget {text!r}: the full net is within all of its limits")
    return joint, 1.0


def named_metrics(budgets: Iterable[str]) -> list[str]:
    """The metrics that any of some budgets is on; a name of a net that is no budget ("width 0.5") is on none."""
    found = set()
    for text in budgets:
        with suppress(BudgetError):
            found |= {part.metric for part in Budget.parse_all(text)}
    return [metric for metric in METRICS if metric in found]


def meaning_of(budget: str) -> frozenset[tuple[str, float, bool]]:
    """What one entry of a list of budgets asks for, however it is written."""
    return frozenset(part.meaning for part in Budget.parse_all(budget))


def as_spelt(budgets: Iterable[str], known: Iterable[str]) -> list[str]:
    """Budgets, each once, in the spelling that is known already if there is one: 0.5x is 50%."""
    spelt = {meaning_of(text): text for text in reversed([*known])}
    return list(dict.fromkeys(spelt.setdefault(meaning_of(text), str(text)) for text in budgets))


def check_closed_forms(budgets: Iterable[str], space: ChannelSpace) -> None:
    """`BudgetError` for a budget out of reach of the space, as far as that can be said without a measurement."""
    costs = costs_of(space)
    for text in budgets:
        parts = Budget.parse_all(text)
        if all(part.metric in costs for part in parts):
            resolve_budget(text, space, costs)
        for part in parts:
            if part.metric in costs:
                part.limit(costs[part.metric], space, may_be_slack=len(parts) > 1)


def readable(amount: float) -> str:
    """A count for people: 1234567 -> 1.23M."""
    if math.isinf(amount):
        return "infinitely many"
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if amount >= scale:
            return f"{amount / scale:.3g}{letter}" if amount / scale < 1000 else f"{amount / scale:.0f}{letter}"
    return f"{amount:.4g}"
