"""Ctrl-C and SIGTERM during training."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """A context that records the first Ctrl-C or SIGTERM in `requested`, so that the step can end.

    A second signal acts as usual.
    """

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Install the handler."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the earlier handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _record(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()


def ignore_interrupts(_worker: int) -> None:
    """Make a worker process ignore Ctrl-C, so that it runs until the main process has saved its state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Keep threads from printing tracebacks: TensorBoard raises the error of its thread in the main thread too."""
    previous, threading.excepthook = threading.excepthook, lambda _: None
    try:
        yield
    finally:
        threading.excepthook = previous


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM, which cluster schedulers send, like Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
