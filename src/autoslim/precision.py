"""A search in bf16, where that is quicker and rounding moves the comparison of nets less than chance does anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autoslim.calibrate import batch_statistics
from autoslim.lending import cloned
from autoslim.scores import Score, count_of
from autoslim.slicing import copy_module, run_subnet
from autoslim.supernet import Supernet
from autoslim.tracing import split_input

_SHARE = 0.5  # of what chance moves, that rounding may move


@dataclass(frozen=True)
class Rounding:
    """What moves differences between the scores of nets, as standard deviations: `rounding`, and `chance`.

    Chance is that of the choice of the held-out images, all of them.
    """

    rounding: float
    chance: float

    @property
    def is_harmless(self) -> bool:
        """Does rounding move less than half of what chance moves?"""
        return self.rounding <= _SHARE * self.chance


def lowered(supernet: Supernet, dtype: torch.dtype = torch.bfloat16) -> Supernet:
    """A copy whose parameters and buffers of floating point are of another type; the original stays as it is."""

    def convert(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()

    copied = Supernet(copy_module(supernet.model, convert), supernet.space)
    return copied.train(supernet.training)


def lowered_inputs(inputs: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Inputs of a model with their tensors of floating point in another type."""
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs
    )


def rounding_of(supernet: Supernet, low: Supernet, batches: Sequence[tuple[Any, Any]], score: Score) -> Rounding:
    """What `low`, a copy in another precision, does to the first step of a search, seen on the first batch.

    The mean scores of the candidates in both precisions: their errors are compared with each other, for what they have
    in common changes no decision. `score` gives a number per sample.
    """
    space, full = supernet.space, supernet.space.full()
    candidates = [net for group in space.groups if (net := space.narrowed(full, group)) is not None]
    inputs, targets = batches[0]
    exact = torch.stack([_scores(supernet, net, inputs, targets, score) for net in candidates])
    lowered_ = lowered_inputs(inputs, next(low.parameters()).dtype)
    rounded = torch.stack([_scores(low, net, lowered_, targets, score) for net in candidates])
    count = sum(count_of(*batch) for batch in batches)
    among = exact - exact.mean(0)  # what all nets find hard is no difference between them
    chance = float(among.var(1).mean().sqrt()) * (2 / count) ** 0.5
    return Rounding(float((rounded - exact).mean(1).std()) * 2**0.5, chance)


def _scores(supernet: Supernet, widths: Any, inputs: Any, targets: Any, score: Score) -> Tensor:
    args, kwargs = split_input(cloned(inputs))  # the model may change them
    with torch.no_grad(), batch_statistics(supernet.model):
        return score(run_subnet(supernet.model, supernet.space, widths, args, kwargs), targets).double().cpu()
