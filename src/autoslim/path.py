"""The greedy path of a run is kept: any budget that it reaches is taken from it, without another search. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoslim.cost import LATENCY, Budget, Cost, costs_of, figures_of, resolve_budget
from autoslim.errors import RunError
from autoslim.files import write_json, write_whole
from autoslim.records import FULL_METRICS, NET_METRICS, STEP, read_checked, read_lines, read_space, read_widths
from autoslim.run import Run
from autoslim.slim import widths_within
from autoslim.space import ChannelSpace, SlimStep, Widths
from autoslim.tables import LatencyCost, LatencyTable


def read_path(run: Run, space: ChannelSpace, cost: Cost) -> list[SlimStep]:
    """The greedy steps written so far; `RunError` if the file is none of this space."""
    widths, steps = space.full(), []
    for number, record in enumerate(read_lines(run.slim_log, STEP), start=1):
        group = str(record.get("group"))
        following = space.narrowed(widths, group) if group in space.groups else None
        if following is None or following[group] != record.get("width"):
            raise RunError(
                f"{run.slim_log}, line {number} does not follow from the ones before; delete it to search again"
            )
        widths = following
        steps.append(SlimStep(group, widths, cost(widths), float(record["score"])))
    return steps


def costs_in(run: Run, space: ChannelSpace) -> dict[str, Cost]:
    """Costs by metric; `latency_ms` by the table of the run, if it has one."""
    costs = costs_of(space)
    if run.latency_table.exists():
        costs[LATENCY] = LatencyCost(space, LatencyTable.load(run.latency_table))
    return costs


def take_from_path(run: Run, budget: str) -> dict[str, Any] | None:
    """Leave `widths.json` and `metrics.json` of the net on the path that meets a budget; returns the metrics.

    None if the path does not reach that far, if latency was not measured yet, or if the run mends its nets by
    exchanges: then the search has to go on. Raises `BudgetError` for a budget out of reach.
    """
    if not run.space.exists() or run.config.slim.exchange:
        return None
    space = read_space(run.space)
    costs = costs_in(run, space)
    if LATENCY not in costs and any(part.metric == LATENCY for part in Budget.parse_all(budget)):
        return None
    cost, limit = resolve_budget(budget, space, costs)
    directory = run.subnet(budget)
    if (directory / "metrics.json").exists():
        return read_checked(directory / "metrics.json", NET_METRICS)
    steps = read_path(run, space, costs["macs"])
    widths = widths_within(space, steps, cost, limit)
    supernet = run.supernet / "metrics.json"
    if widths is None or not supernet.exists():
        return None
    accuracy = {"supernet": read_checked(supernet, FULL_METRICS)["accuracy"]}
    metrics = _placed({"budget": budget, **figures_of(costs, widths), "accuracy": accuracy}, run, steps, widths)
    write_whole(directory / "widths.json", widths.to_json())
    write_json(directory / "metrics.json", metrics)
    return metrics


def found_on_path(run: Run, budget: str) -> dict[str, Any]:
    """The metrics of a net that a search has just found, as `take_from_path` gives them: with its place on the path."""
    space, directory = read_space(run.space), run.subnet(budget)
    metrics = read_checked(directory / "metrics.json", NET_METRICS)
    if metrics.get("exchanges"):  # it has left the path
        return metrics
    steps = read_path(run, space, costs_of(space)["macs"])
    return _placed(metrics, run, steps, read_widths(directory / "widths.json", space))


def _placed(metrics: dict[str, Any], run: Run, steps: Sequence[SlimStep], widths: Widths) -> dict[str, Any]:
    """Metrics with the number of steps to a net, and with its accuracy on the held-out images."""
    taken = next((number for number, step in enumerate(steps, start=1) if step.widths == widths), 0)
    accuracy = dict(metrics["accuracy"])
    if taken:
        accuracy["held_out"] = read_lines(run.slim_log, STEP)[taken - 1].get("accuracy")
    return {**metrics, "accuracy": accuracy, "steps": taken}
