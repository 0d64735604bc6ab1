"""Worker processes that read images, by torch's `DataLoader`."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
    return _Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        generator=torch.Generator(),
        **options,
    )


class _Loader(DataLoader[Any]):
    def check_worker_number_rationality(self) -> None:
        """Say nothing: more workers than processors are right where images come over a network."""


def close_loader(loader: DataLoader[Any]) -> None:
    """End the worker processes of a loader that keeps them."""
    iterator, loader._iterator = loader._iterator, None
    _end(iterator)


def _end(iterator: Any) -> None:
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        with suppress(RuntimeError):  # the signal of a killed worker may arrive only now
            shutdown()


def items_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives; `DataError` for the first `Failure`, or for a worker that was killed."""
    iterator = iter(loader)
    try:
        for item in iterator:
            if isinstance(item, Failure):
                raise DataError(item.text)
            yield item
    except (DataError, RuntimeError, OSError, EOFError) as error:  # the last two: a connection to a worker that broke
        loader._iterator = None
        _end(iterator)
        ended = worker_ended(error)
        if ended is None:
            raise
        raise ended from error


def worker_ended(error: BaseException) -> DataError | None:
    """The error to show for a worker process that was killed; None if it is another one.

    torch raises it from a signal handler, so it may come out of any line that runs meanwhile.
    """
    is_broken = isinstance(error, (ConnectionError, EOFError))
    if not (is_broken or (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"))):
        return None
    return DataError(
        f"a process that reads images was ended from outside ({first_line(error)}); memory may be short: "
        "set data.workers lower"
    )


def _as_it_is(batch: Any) -> Any:
    return batch
