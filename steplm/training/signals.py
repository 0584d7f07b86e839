"""A signal asks for a checkpoint and an orderly end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Stoppable(Protocol):
    """Looks at ``requested_signal`` between steps."""

    requested_signal: int | None


@contextmanager
def stopping_on_signals(work: Stoppable) -> Iterator[None]:
    """SIGTERM and SIGINT are noted in ``work.requested_signal``; a second Ctrl-C ends at once.

    Not in the main thread, which alone can have handlers, the caller's own stay.
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
