"""One suite per directory; and none begins before the runs of a killed one have ended."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from steplm.errors import SteplmError

RUNS_LOCK = ".runs.lock"  # shared by every run's process while it lives


@contextmanager
def exclusive(directory: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a suite's directory. Locks go with their processes, however they end.

    Raises:
        SteplmError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SteplmError(
                f"another process runs the suite in {directory}. Wait for it, stop it, or use another output_dir.",
                path=str(directory),
            ) from None
        with (directory / RUNS_LOCK).open("w") as runs:
            try:
                fcntl.flock(runs, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(runs, fcntl.LOCK_EX)
        yield


@contextmanager
def shared_lock(file: Path) -> Iterator[None]:
    """Held together with others; whoever wants it alone waits for all of them."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
