"""File locks: one suite per directory, and none starts before the runs of a killed suite have ended."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from steplm.errors import SteplmError

RUNS_LOCK = ".runs.lock"  # every run's process holds it, shared, while it lives


@contextmanager
def exclusive(directory: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Lock a suite's directory; the lock is released when the process ends, however it ends.

    Raises:
        SteplmError: another process holds the lock.
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
    """Hold a shared lock; a process that wants it exclusively waits for all holders."""
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
