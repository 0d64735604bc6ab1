"""How much memory is free, and whether images fit into it."""

from __future__ import annotations

import os

from autoslim.errors import DataError


def check_memory(needed: int, what: str, remedy: str | None = None) -> None:
    """`DataError` if `needed` bytes are more than half of what is free: cutting the parts copies them once."""
    available = available_bytes()
    if available is not None and needed > available / 2:
        raise DataError(
            f"{what} need {needed / 1e6:,.0f} MB, more than half of the {available / 1e6:,.0f} MB of free memory; "
            f"{remedy or 'take a smaller image size or fewer images'}"
        )


def available_bytes() -> int | None:
    """Free memory of the machine; None where it cannot be told."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS tells only what there is in all
    except (AttributeError, ValueError, OSError):
        return None
