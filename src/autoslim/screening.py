"""Which candidates of a greedy step are worth measuring: an estimate of all of them by one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autoslim.calibrate import batch_statistics
from autoslim.errors import ConfigError
from autoslim.lending import cloned
from autoslim.scores import Score, find_score
from autoslim.slicing import run_subnet
from autoslim.slim import rank
from autoslim.sorting import output_dims
from autoslim.space import ChannelSpace, Widths, check_whole
from autoslim.supernet import Supernet, unwrapped
from autoslim.tracing import split_input


def promising(
    supernet: Supernet,
    widths: Widths,
    candidates: Mapping[str, Widths],
    batch: tuple[Any, Any],
    score: str | Score,
    count: int,
    savings: Mapping[str, float] | None = None,
) -> dict[str, Widths]:
    """The `count` candidates of a greedy step that should score best, in their order; all, if there are no more.

    By `estimates`, per cost saved where `savings` are given. Off by default, for it looks at a step of 1/12 of a layer
    through a tangent: benchmarks/LOG.md says how often the best candidate is among them.
    """
    supernet, score = unwrapped(supernet, Supernet), find_score(score)
    check_whole(ConfigError, count=count)
    if count >= len(candidates):
        return dict(candidates)
    found = estimates(supernet, widths, candidates, batch, score)
    if savings is None:
        ranks = {group: rank(value, None) for group, value in found.items()}
    else:
        ranks = {group: rank(value / savings[group], savings[group]) for group, value in found.items()}
    best = set(sorted(ranks, key=lambda group: ranks[group], reverse=True)[:count])
    return {group: candidate for group, candidate in candidates.items() if group in best}


def estimates(
    supernet: Supernet,
    widths: Widths,
    candidates: Mapping[str, Widths],
    batch: tuple[Any, Any],
    score: Score,
) -> dict[str, float]:
    """By how much the mean score on a batch changes from `widths` to each candidate, to first order.

    To take a channel away is to set to zero the weights that read it, so the change is minus the sum of weight times
    gradient over these (Molchanov et al. 2019, on the side of the consumers: what produces a channel that BatchNorm
    normalises has no first-order effect at all). Channels that no weight reads, as those of two activations multiplied,
    are told by the weights that produce them. One forward and one backward pass with batch statistics; gradients,
    buffers and modes of the model stay as they are. Raises `ConfigError` for a score without a gradient.
    """
    model, space = supernet.model, supernet.space
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point() and name in space.parameters}
    inputs, targets = batch
    args, kwargs = split_input(cloned(inputs))  # the model may change them
    with torch.enable_grad(), batch_statistics(model), _with_gradients(parameters.values()):
        output = run_subnet(model, space, widths, args, kwargs)
        mean = score(output, targets).mean()
        if not mean.requires_grad:
            raise ConfigError("screening needs a score with a gradient, such as 'loss'; the score given has none")
        gradients = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
    products = {
        name: (parameter.detach() * gradient).double()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        if gradient is not None
    }
    writes = output_dims(model, space)
    return {group: -_removed(products, space, writes, group, widths, narrow) for group, narrow in candidates.items()}


def _removed(
    products: Mapping[str, Tensor],
    space: ChannelSpace,
    writes: Mapping[str, int],
    group: str,
    widths: Widths,
    narrow: Widths,
) -> float:
    """The sum of weight times gradient over the weights that read the channels taken away."""
    reading = writing = 0.0
    is_read = False
    for name, product in products.items():
        for dim, axis in enumerate(space.parameters[name]):
            if group not in axis.groups:
                continue
            gone = sorted({*axis.positions(widths)} - {*axis.positions(narrow)})
            value = float(product.index_select(dim, torch.tensor(gone, dtype=torch.long, device=product.device)).sum())
            if writes.get(name, dim) != dim:
                reading, is_read = reading + value, True
            else:
                writing += value
    return reading if is_read else writing


@contextmanager
def _with_gradients(parameters: Any) -> Iterator[None]:
    """Frozen parameters take gradients too, for the time being."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
