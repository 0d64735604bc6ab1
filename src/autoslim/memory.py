"""Out of memory: what would have fitted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from autoslim.errors import AutoSlimError, TrainError

T = TypeVar("T")

_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "could not create a memory",
)
_NO_KERNEL = (
    "could not create a primitive"  # of oneDNN without room for its code; one it does not have is a "descriptor"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Is it that? CUDA and the CPU allocator have different errors for it, and oneDNN yet another."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and (any(part in text for part in _TEXTS) or text.strip() == _NO_KERNEL)
    )


def fitting_batch(run: Callable[[int], object], size: int) -> int | None:
    """The largest half, quarter ... of `size` samples for which `run` does not run out of memory; None if 1 does."""
    while size > 1:
        size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            run(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return size
    return None


def in_smaller_batches(run: Callable[[int], T], size: int, work: str) -> T:
    """`run(size)`, or `run` of its half, quarter ... where memory does not suffice: for what does not depend on it.

    Raises `TrainError`, naming the `work`, if one sample is too many.
    """
    found: list[T] = []

    def keep(smaller: int) -> None:
        found.append(run(smaller))

    try:
        keep(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if not found and fitting_batch(keep, size) is None:  # here, where the error holds no tensors any more
        raise TrainError(f"out of memory, {work}, even for a batch of 1; take smaller images or a smaller network")
    return found[0]


def parts_of(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most `size` samples."""
    for inputs, targets in batches:
        yield from zip(torch.split(inputs, size), torch.split(targets, size), strict=True)


@contextmanager
def naming_memory(text: str, kind: type[AutoSlimError] = TrainError) -> Iterator[None]:
    """Out of memory is an error of that kind, with this text."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise kind(f"out of memory ({_first_line(error)}){text}") from error


def _first_line(error: BaseException) -> str:
    """What was asked for, without the place in torch's own code."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition("DefaultCPUAllocator: ")[2] or line[:200]
