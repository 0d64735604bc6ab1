"""How large the batches of a search may be, and how much of a pass may be kept, within a limit of memory. No torch.

BatchNorm normalises a candidate with the statistics of its batch, so another batch size gives other scores: it is
decided once, from bytes that follow from the space, before the first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod

from autoslim.cost import PeakMemoryCost, readable
from autoslim.errors import ConfigError
from autoslim.space import ChannelSpace, Widths, a_space, as_number, check_whole

KEPT_BYTES = 2 * 1024**3
_TRIAL = 20  # measured: three images, in double precision, every result of two passes with copies, in such images

_BACKWARD = 1.5  # every activation, and the gradients on their way


@dataclass(frozen=True)
class Fit:
    """Images in a batch, and the bytes that a `ReuseJudge` may keep of a pass (0: every candidate runs as a whole)."""

    batch_size: int
    keep_bytes: int


def fit_batches(
    space: ChannelSpace,
    memory_bytes: float,
    *,
    batch_size: int = 250,
    keep_bytes: int = KEPT_BYTES,
    samples: int = 1,
    element_bytes: int = 4,
    screened: bool = False,
) -> Fit:
    """The largest batches, at most `batch_size`, with which a search stays within `memory_bytes`.

    Counted are the weights, the tensors alive at the worst moment of a pass of the full net, what is kept of it, and
    the trial passes by which a `ReuseJudge` finds out what can be kept; not the images, and not the scratch space of
    kernels (see `PeakMemoryCost`). Half of what the weights leave is for the pass, the rest for what is kept. If the
    trial takes more than a third, nothing is kept. `samples`: images in the example that the space was traced with.
    `screened`: there is a backward pass too, which holds every activation of a batch and the gradients of the weights.
    Raises `ConfigError` if two images are too many, if the space does not know how long activations live, or for a
    number that cannot be one of images or bytes.
    """
    check_whole(ConfigError, 2, batch_size=batch_size)
    check_whole(ConfigError, samples=samples, element_bytes=element_bytes)
    check_kept(keep_bytes)
    if not 0 <= as_number(memory_bytes) < math.inf:
        raise ConfigError(f"memory_bytes={memory_bytes!r} is no limit in bytes; give one such as 2e9")
    if not a_space(space).activations:
        raise ConfigError("memory cannot be limited: how long the activations of this network live is not known")
    full = space.full()
    weights = element_bytes * sum(
        prod(axis.kept(full) for axis in axes) for axes in (*space.parameters.values(), *space.buffers.values())
    )
    image = (PeakMemoryCost(space, element_bytes)(full) - weights) / samples
    left = memory_bytes - 2 * weights  # a candidate's tensors may be copies
    if screened:
        image = _BACKWARD * _all_results(space, element_bytes, full) / samples
        left -= 2 * weights  # gradients, and their products with the weights
    least = 2 * image
    if left < least:
        beside = memory_bytes - left
        raise ConfigError(
            f"{readable(memory_bytes)} bytes are too little for a search: the weights take {readable(beside)}, a pass "
            f"of two images {readable(least)} bytes; allow {readable(beside + least)} or smaller images"
        )
    trial = 3 * weights + _TRIAL * _all_results(space, element_bytes, _narrow(space)) / samples
    if keep_bytes == 0 or trial > left / 3:
        return Fit(min(batch_size, int(left // image)), 0)
    left -= trial
    size = max(2, min(batch_size, int(left / 2 // image)))
    return Fit(size, max(0, min(keep_bytes, int(left - size * image))))


def check_kept(keep_bytes: object) -> None:
    """`ConfigError` for what is no number of bytes that may be kept of a pass."""
    if not as_number(keep_bytes) >= 0:
        raise ConfigError(
            f"keep_bytes={keep_bytes!r} is no number of bytes; give one such as 2e9, or 0 to keep nothing"
        )


def _narrow(space: ChannelSpace) -> Widths:
    """At most so wide are the nets of the trial."""
    return Widths((g.name, g.choices[min(2, len(g.choices) - 1)]) for g in space.groups.values())


def _all_results(space: ChannelSpace, element_bytes: int, widths: Widths) -> float:
    """Bytes of every activation of the example."""
    return element_bytes * sum(each.scale * prod(axis.kept(widths) for axis in each.axes) for each in space.activations)
