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
from autoslim.cost import (
    LATENCY,
    Budget,
    Cost,
    as_spelt,
    check_closed_forms,
    costs_of,
    resolve_budget,
    slimmable_share,
)
from autoslim.data import load_data
from autoslim.distributed import usable_device
from autoslim.errors import BudgetError
from autoslim.latency import latencies, measure_latency_table, say_if_disturbed, spread
from autoslim.models import build_model, check_numbers, has_numbers
from autoslim.progress import Progress
from autoslim.records import read_widths
from autoslim.run import Run, read_run
from autoslim.runtimes import find_runtime, torch_threads
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
    budgets of `latency_ms` the network is measured. What a run refuses before training is refused here: a runtime that
    is not installed, a device that is not there, too little memory for the search.
    """
    find_runtime(config.latency.runtime)
    device = usable_device(config.device)
    model, every, example = _traced(config, shape, from_data=from_data)
    budgets = config.slim.budgets if with_budgets else ()
    config.slim.fit(config.space.choices(every))
    refused = _refused(budgets, config.space.choices(every))
    space, latency = searched_space(
        config,
        model.to(device) if has_numbers(model) else model,
        every,
        example.to(device),
        budgets=[text for text in budgets if text not in refused],
        progress=progress,
    )
    costs: dict[str, Cost] = costs_of(space) | ({} if latency is None else {LATENCY: latency})
    full, smallest = (
        {name: round(cost(widths), 4) if name == LATENCY else int(cost(widths)) for name, cost in costs.items()}
        for widths in (space.full(), space.smallest())
    )
    return {
        "groups": [asdict(group) for group in space.groups.values()],
        "frozen": [asdict(note) for note in space.notes],
        "remarks": list(space.remarks),
        "mixing": list(space.mixing),
        **full,
        "smallest": smallest,
        "slimmable_macs": slimmable_share(space),
        "budgets": [_verdict(text, space, costs, refused.get(text)) for text in budgets],
    }


def _refused(budgets: Iterable[str], space: ChannelSpace) -> dict[str, str]:
    """Why budgets cannot be met whatever the latency, by their text."""
    reasons = {}
    for text in budgets:
        try:
            check_closed_forms([text], space)
        except BudgetError as error:
            reasons[text] = str(error)
    return reasons


def _traced(
    config: Config, shape: tuple[int, ...] | None, *, from_data: bool
) -> tuple[nn.Module, ChannelSpace, Tensor]:
    if shape is None and from_data:
        data = load_data(config.data.source, **config.data.reading())
        shape = (1, *data.image_shape)
    model = build_model(config.model, config.model_args)
    example = torch.zeros(shape or _USUAL_SHAPE)
    every = trace(model, example, **config.space.wishes())
    if config.train.channels_last:  # as a run measures it
        model = model.to(memory_format=torch.channels_last)
    return model, every, example


def _verdict(text: str, space: ChannelSpace, costs: Mapping[str, Cost], refused: str | None) -> dict[str, Any]:
    parts = Budget.parse_all(text)
    metric = " and ".join(budget.metric for budget in parts)
    try:
        _, limit = resolve_budget(text, space, costs) if refused is None else (None, 0.0)
    except BudgetError as error:
        refused = str(error)
    if refused is not None:
        return {"budget": text, "metric": metric, "reachable": False, "reason": refused}
    full = space.full()
    slack = [
        part.text
        for part in parts
        if costs[part.metric](full) <= part.limit(costs[part.metric], space, may_be_slack=True)
    ]
    return {"budget": text, "metric": metric, "reachable": True, "limit": limit, "slack": slack}


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
    """The space with the widths that may be chosen, and the cost for `latency_ms` if anything asks for it.

    The table is the one `kept` by a run, if it exists, that of the configuration, or, for budgets on latency and for
    measured widths, one measured here. Budgets that no latency could save are refused before: `BudgetError`.
    """
    space, budgets = config.space.choices(every), list(budgets)
    check_closed_forms(budgets, space)
    is_kept = kept is not None and kept.exists()
    is_given = is_kept or config.latency.table is not None
    if not (is_given or config.space.bins == "measured" or needs_latency(budgets)):
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
        found = LatencyTable.load(given)
        say_if_disturbed(found, progress)
        return LatencyCost(space, found)
    check_numbers(config.model, model)
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
    given: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What each operator of a net takes, and the whole net: as predicted, and as measured end to end.

    The net has uniform widths, at `ratio` or for `budget`; of a run, it is the one found for the budget. The table is
    written to `csv`. That of a run is used if it is of the same runtime, threads and device, unless the table of the
    configuration is `given`, instead of it, or all are measured anew (`fresh`).
    """
    find_runtime(config.latency.runtime)
    device = usable_device(config.device)
    opened = None if run is None else read_run(run)
    kept = opened.latency_table if opened is not None and not given else None
    if fresh or (kept is not None and opened is not None and kept.exists() and not _is_table_for(opened, config)):
        kept, config = None, config.model_copy(update={"latency": config.latency.model_copy(update={"table": None})})
    model, every, example = _traced(config, shape, from_data=from_data)
    check_numbers(config.model, model)
    model, example = model.to(device), example.to(device)
    space, cost = searched_space(
        config,
        model,
        every,
        example,
        budgets=[_ANY_LATENCY],
        progress=progress,
        kept=kept,
        fresh=fresh,
    )
    assert cost is not None, "a budget on latency was named"
    if csv is not None:
        cost.table.save(csv)
    name, widths = _asked_net(space, cost, opened, config.space.choices(every), ratio, budget)
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


def _is_table_for(run: Run, config: Config) -> bool:
    """Is the table of a run of the runtime, threads and device that are asked for?"""
    known, asked = (
        {"runtime": each.latency.runtime, "threads": str(each.latency.threads or each.threads), "device": each.device}
        for each in (run.config, config)
    )
    if run.config.latency.table is None:  # the run measured it; one from elsewhere is of whatever machine
        about = LatencyTable.load(run.latency_table).about
        known |= {key: about[key] for key in ("runtime", "threads") if key in about}
    return known == asked


def _asked_net(
    space: ChannelSpace, cost: LatencyCost, run: Run | None, all_choices: ChannelSpace, ratio: float, budget: str | None
) -> tuple[str, Widths]:
    if budget is None:
        return ("full net" if ratio == 1.0 else f"widths x{ratio:g}"), space.uniform(ratio)
    if run is not None:
        spelt = budget
        if run.config.system == "autoslim":
            (spelt,) = as_spelt([budget], run.config.slim.budgets)
        if (found := run.subnet(spelt) / "widths.json").exists():
            return f"found for {spelt}", read_widths(found, all_choices)  # other tables measure other choices
    costs: dict[str, Cost] = {**costs_of(space), LATENCY: cost}
    chosen, limit = resolve_budget(budget, space, costs)
    ratio, widths = uniform_like(space, chosen, limit)
    return f"widths x{ratio:.3g}, near {budget}", widths
