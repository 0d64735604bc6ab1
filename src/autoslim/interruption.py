"""SIGTERM and SIGINT: work that can stop in good order is asked to; anything else is stopped at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The process was asked to stop, and what is on disk is in good order. The exit code is 128 + `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interruption:
    """While `caught`, remembers a signal for work that looks at `is_asked` now and then, and stops other work at once.

    A second SIGINT does not wait any longer. (torchrun sends SIGTERM after the SIGINT of a terminal.)
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._depth = 0

    @property
    def is_asked(self) -> bool:
        """Was there a signal since the work began?"""
        return self._asked is not None

    def stop(self, default: int = signal.SIGTERM) -> Stopped:
        """What to raise once everything is in order; `default` when it was another process that was asked."""
        return Stopped(default if self._asked is None else self._asked)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Work that looks at `is_asked` by itself."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Take both signals, and give them back afterwards. Elsewhere than in the main thread this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._asked = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second = self._asked is not None and number == signal.SIGINT
        self._asked = self._asked or number
        if not self._depth or is_second:
            raise Stopped(number)


interruption = Interruption()  # signals belong to the process, and so does this
