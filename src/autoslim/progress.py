"""What a long job tells whoever is watching: an interface, silent by default. The command line draws bars with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[float, str], None]


class Progress:
    """Told about stages and steps; this one says nothing."""

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Advance]:
        """A piece of work of `total` steps: call what it gives with the steps done so far and a short remark."""
        yield lambda done, remark: None

    def say(self, text: str) -> None:
        """A line worth keeping."""
