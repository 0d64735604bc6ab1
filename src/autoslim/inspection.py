"""What `autoslim inspect` and `autoslim latency` say about a network, as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.config import Config
from autoslim.cost import LATENCY, Budget, Cost, costs_of, resolve_budget, slimmable_share
from autoslim.data import load_data
from autoslim.errors import BudgetError
from autoslim.latency import latencies, measure_latency_table, spread
from autoslim.models import build_model
from autoslim.progress import Progress
from autoslim.records import read_widths
from autoslim.run import read_run
from autoslim.runtimes import torch_threads
from autoslim.slicing import extract
from autoslim.slim import uniform_like
from autoslim.space import ChannelSpace, Widths
from autoslim.tables import LatencyCost, LatencyTable, hot_operators
from autoslim.tracing import trace

_USUAL_SHAPE = (1, 3, 224, 224)
_ANY_LATENCY = f"{LATENCY}<=100%"


def inspect_model(
    config: Config,
    shape: tuple[int, ...] | None = None,
    *,
    from_data: bool = False,
    with_budgets: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Groups, frozen layers, costs of the full and the smallest net, and whether each budget is within reach.

    The example input has `shape`, or that of the configured data (`from_data`), or is one 224-pixel colour image. For
    budgets of `latency_ms` the network is measured.
    """
    model, every, example = _traced(config, shape, from_data=from_data)
    budgets = config.slim.budgets if with_budgets else ()
    space, latency = searched_space(config, model, every, example, budgets=budgets, progress=progress)
    costs = costs_of(space)
    full, smallest = (
        {name: int(cost(widths)) for name, cost in costs.items()} for widths in (space.full(), space.smallest())
    )
    if latency is not None:
        costs[LATENCY] = latency
    return {
        "groups": [asdict(group) for group in space.groups.values()],
        "frozen": [asdict(note) for note in space.notes],
        "remarks": list(space.remarks),
        "mixing": list(space.mixing),
        **full,
        "smallest": smallest,
        "slimmable_macs": slimmable_share(space),
        "budgets": [_verdict(text, space, costs) for text in budgets],
    }


def _traced(
    config: Config, shape: tuple[int, ...] | None, *, from_data: bool
) -> tuple[nn.Module, ChannelSpace, Tensor]:
    if shape is None and from_data:
        data = load_data(config.data.source, **config.data.reading())
        shape = (1, *data.image_shape)
    model = build_model(config.model, config.model_args)
    example = torch.zeros(shape or _USUAL_SHAPE)
    return model, trace(model, example, **config.space.wishes()), example


def _verdict(text: str, space: ChannelSpace, costs: Mapping[str, Cost]) -> dict[str, Any]:
    metric = " and ".join(budget.metric for budget in Budget.parse_all(text))
    try:
        _, limit = resolve_budget(text, space, costs)
    except BudgetError as error:
        return {"budget": text, "metric": metric, "reachable": False, "reason": str(error)}
    return {"budget": text, "metric": metric, "reachable": True, "limit": limit}


def needs_latency(budgets: Iterable[str]) -> bool:
    """Is one of the budgets on latency?"""
    return any(part.metric == LATENCY for text in budgets for part in Budget.parse_all(text))


def searched_space(
    config: Config,
    model: nn.Module,
    every: ChannelSpace,
    example: Tensor,
    *,
    budgets: Iterable[str],
    progress: Progress | None = None,
    kept: Path | None = None,
    fresh: bool = False,
) -> tuple[ChannelSpace, LatencyCost | None]:
    """The space with the widths that may be chosen, and the cost for `latency_ms` if budgets or widths ask for it.

    The table is the one `kept` by a run, if it exists, that of the configuration, or one measured here.
    """
    space = config.space.choices(every)
    is_kept = kept is not None and kept.exists()
    if not (is_kept or config.space.bins == "measured" or needs_latency(budgets)):
        return space, None
    cost = _latency_cost(config, model, space, example, progress, kept=kept if is_kept else None, fresh=fresh)
    if config.space.bins == "measured":
        space = space.with_steps(cost)
    return space, LatencyCost(space, cost.table)


def _latency_cost(
    config: Config,
    model: nn.Module,
    space: ChannelSpace,
    example: Tensor,
    progress: Progress | None,
    *,
    kept: Path | None,
    fresh: bool,
) -> LatencyCost:
    latency = config.latency
    given = kept or (Path(latency.table) if latency.table is not None else None)
    if given is not None:
        return LatencyCost(space, LatencyTable.load(given))
    table = measure_latency_table(
        model,
        space,
        example,
        runtime=latency.runtime,
        threads=latency.threads or config.threads,
        nets=latency.nets,
        fresh=fresh,
        progress=progress,
    )
    return LatencyCost(space, table)


def latency_facts(
    config: Config,
    shape: tuple[int, ...] | None = None,
    *,
    run: Path | None = None,
    from_data: bool = False,
    ratio: float = 1.0,
    budget: str | None = None,
    csv: Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What each operator of a net takes, and the whole net: as predicted, and as measured end to end.

    The net has uniform widths, at `ratio` or for `budget`; of a run, it is the one found for the budget. The table is
    written to `csv`.
    """
    model, every, example = _traced(config, shape, from_data=from_data)
    model, example = model.to(config.device), example.to(config.device)
    space, cost = searched_space(
        config,
        model,
        every,
        example,
        budgets=[_ANY_LATENCY],
        progress=progress,
        kept=None if run is None or fresh else read_run(run).latency_table,
        fresh=fresh,
    )
    assert cost is not None, "a budget on latency was named"
    if csv is not None:
        cost.table.save(csv)
    name, widths = _asked_net(space, cost, run, ratio, budget)
    threads = config.latency.threads or config.threads
    samples = latencies(extract(model, space, widths), example, config.latency.runtime, threads)
    with torch_threads(threads) as count:
        return {
            "model": config.model,
            "net": name,
            "runtime": config.latency.runtime,
            "threads": count,
            "table": dict(cost.table.about),
            "predicted_ms": cost(widths),
            "measured_ms": statistics.median(samples),
            "spread_ms": spread(samples),
            "operators": hot_operators(cost, widths),
        }


def _asked_net(
    space: ChannelSpace, cost: LatencyCost, run: Path | None, ratio: float, budget: str | None
) -> tuple[str, Widths]:
    if budget is None:
        return ("full net" if ratio == 1.0 else f"widths x{ratio:g}"), space.uniform(ratio)
    if run is not None and (found := read_run(run).subnet(budget) / "widths.json").exists():
        return f"found for {budget}", read_widths(found, space)
    costs: dict[str, Cost] = {**costs_of(space), LATENCY: cost}
    chosen, limit = resolve_budget(budget, space, costs)
    ratio, widths = uniform_like(space, chosen, limit)
    return f"widths x{ratio:.3g}, near {budget}", widths
