"""Signal handling: save a checkpoint and exit cleanly."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Stoppable(Protocol):
    """Work that checks ``requested_signal`` between steps."""

    requested_signal: int | None


def describe_stop(signum: int) -> str:
    """How a signal ended work that can be resumed, such as ``"interrupted; run the same command again to resume"``."""
    how = "interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}"
    return f"{how}; run the same command again to resume"


@contextmanager
def stopping_on_signals(work: Stoppable) -> Iterator[None]:
    """Record SIGTERM and SIGINT in ``work.requested_signal``; a second Ctrl-C stops immediately.

    Only the main thread can install signal handlers; in any other thread the existing handlers stay in place.
    """

    def ask(signum: int, frame: FrameType | None) -> None:
        if work.requested_signal == signal.SIGINT == signum:
            raise KeyboardInterrupt
        work.requested_signal = signum

    try:
        before = {signum: signal.signal(signum, ask) for signum in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
