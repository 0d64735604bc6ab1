"""Out of memory: what would have fitted."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "could not create a memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Is it that? CUDA and the CPU allocator have different errors for it, and oneDNN yet another."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(part in text for part in _TEXTS)
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
