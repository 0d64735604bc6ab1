"""Every mistake a user can make has a class here; the command line prints its one line and ends with exit code 2.

The text says what was given, where, and what would work. Broken invariants of our own are `assert`s, never these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutoSlimError(Exception):
    """Base of everything raised for a user's mistake."""


class TraceError(AutoSlimError):
    """The model cannot be traced: it is no module, does not run on the example input, or has nothing to slim."""


class SpaceError(AutoSlimError):
    """Widths, choices or a space file do not fit the channel space."""


class BudgetError(AutoSlimError):
    """A budget cannot be read, or lies outside what the network can reach."""


class LatencyError(AutoSlimError):
    """A latency table lacks an operator or a width, cannot be read, or its runtime is not installed."""


class ConfigError(AutoSlimError):
    """A configuration file, a `--set` override or a name in it is wrong."""


class DataError(AutoSlimError):
    """Images or labels cannot be used."""


class TrainError(AutoSlimError):
    """Training cannot go on, as after a loss that is not a number."""


class RunError(AutoSlimError):
    """A run directory is damaged, belongs to another configuration, or cannot be written."""


class ExportError(AutoSlimError):
    """A network cannot be written or read in the format asked for."""


def counted(number: int, thing: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def nearest(given: str, known: Iterable[str]) -> str:
    """The end of an error text: the nearest known name, or all of them when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(given, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "none is known here"
