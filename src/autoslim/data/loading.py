"""Worker processes that read images, by torch's `DataLoader`."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from autoslim.data.pixels import first_line
from autoslim.errors import DataError

_MOST_WORKERS = 8


@dataclass(frozen=True)
class Failure:
    """What a worker gives instead of images that it cannot read: the message, in one line."""

    text: str


def usual_workers() -> int:
    """As many worker processes as there are processors for this one, up to 8; none if there is only one."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # set by torchrun
    return min(_MOST_WORKERS, share) if share > 1 else 0


def make_loader(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    workers: int,
    *,
    prefetch: int = 2,
    pin: bool = False,
    persistent: bool = False,
) -> DataLoader[Any]:
    """A loader of the batches planned, in their order; it draws nothing from torch's global generator.

    `dataset` gives a whole batch by `__getitems__`.
    """
    options: dict[str, Any] = {}
    if workers:
        # forked workers share the images and the user's own code with this process; elsewhere both are pickled
        context = "fork" if sys.platform.startswith("linux") else None
        options = {
            "prefetch_factor": prefetch,
            "persistent_workers": persistent,
            "multiprocessing_context": multiprocessing.get_context(context),
        }
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        generator=torch.Generator(),
        **options,
    )


def close_loader(loader: DataLoader[Any]) -> None:
    """End the worker processes of a loader that keeps them."""
    iterator = loader._iterator
    if iterator is not None:
        loader._iterator = None
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


def items_of(loader: DataLoader[Any]) -> Iterable[Any]:
    """What a loader gives; `DataError` for the first `Failure`, or for a worker that was killed."""
    try:
        for item in loader:
            if isinstance(item, Failure):
                close_loader(loader)
                raise DataError(item.text)
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images was ended from outside ({first_line(error)}); memory may be short: "
            "set data.workers lower"
        ) from error


def _as_it_is(batch: Any) -> Any:
    return batch
