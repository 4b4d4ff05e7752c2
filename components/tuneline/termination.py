"""SIGTERM: a reclaimed node or a cancelled run asks the process to end.

By default it ends at once, as `Terminated` raised where the process stands. A block that has
something to save defers it: the request is noted, and the block ends itself where that is safe.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tuneline.errors import Terminated


def raise_on_sigterm() -> None:
    """From now on, SIGTERM raises `Terminated`."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated


class Termination:
    """Whether SIGTERM has arrived."""

    def __init__(self) -> None:
        self.requested = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True


@contextmanager
def deferred() -> Iterator[Termination]:
    """Inside the block SIGTERM is noted only; whoever holds the result decides when to end.

    Outside of the main thread Python handles no signals, and the request is never made.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    before = signal.signal(signal.SIGTERM, termination._note)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, before)
