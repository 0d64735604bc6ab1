"""What `autoslim inspect` says about a network, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from autoslim.config import Config
from autoslim.cost import Budget, Cost, costs_of, resolve_budget, slimmable_share
from autoslim.data import load_data
from autoslim.errors import BudgetError
from autoslim.models import build_model
from autoslim.space import ChannelSpace
from autoslim.tracing import trace

_USUAL_SHAPE = (1, 3, 224, 224)


def inspect_model(
    config: Config, shape: tuple[int, ...] | None = None, *, from_data: bool = False, with_budgets: bool = True
) -> dict[str, Any]:
    """Groups, frozen layers, costs of the full and the smallest net, and whether each budget is within reach.

    The example input has `shape`, or that of the configured data (`from_data`), or is one 224-pixel colour image.
    """
    if shape is None and from_data:
        data = load_data(config.data.source, image_size=config.data.image_size, skip_broken=config.data.skip_broken)
        shape = (1, *data.image_shape)
    model = build_model(config.model, config.model_args)
    every = trace(model, torch.zeros(shape or _USUAL_SHAPE), **config.space.wishes())
    space = every.with_choices(config.space.bins, config.space.divisor, config.space.min_ratio)
    costs = costs_of(space)
    full, smallest = (
        {name: int(cost(widths)) for name, cost in costs.items()} for widths in (space.full(), space.smallest())
    )
    return {
        "groups": [asdict(group) for group in space.groups.values()],
        "frozen": [asdict(note) for note in space.notes],
        "remarks": list(space.remarks),
        "mixing": list(space.mixing),
        **full,
        "smallest": smallest,
        "slimmable_macs": slimmable_share(space),
        "budgets": [_verdict(text, space, costs) for text in config.slim.budgets] if with_budgets else [],
    }


def _verdict(text: str, space: ChannelSpace, costs: Mapping[str, Cost]) -> dict[str, Any]:
    metric = " and ".join(budget.metric for budget in Budget.parse_all(text))
    try:
        _, limit = resolve_budget(text, space, costs)
    except BudgetError as error:
        return {"budget": text, "metric": metric, "reachable": False, "reason": str(error)}
    return {"budget": text, "metric": metric, "reachable": True, "limit": limit}
