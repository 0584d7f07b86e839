"""Messages of several processes on one terminal, and failure reports for the launcher."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from steplm.errors import RankLost, SteplmError
from steplm.launch import is_launched, launched_rank, launched_size

# An invalid configuration fails on every rank. Rank 0 reports it, while the others stay silent until the launcher stops
# them. Ranks that only know that another rank is lost do the same.
SECONDS_OF_SILENCE = 20.0


def who() -> str:
    """The prefix of this process's messages: its rank, if there are several."""
    return f"rank {launched_rank()}: " if launched_size() > 1 else ""


@contextmanager
def failure_told_to_launcher() -> Iterator[None]:
    """Record errors for ``torchrun``, so that its summary shows the first rank that failed, and its error."""
    try:
        yield
    except Exception as error:
        if not is_launched():
            raise
        is_told = launched_rank() != 0 and isinstance(error, SteplmError) and error.exit_code == 2
        if is_told or isinstance(error, RankLost):
            time.sleep(SECONDS_OF_SILENCE)
        if isinstance(error, SteplmError | OSError):
            # As PyTorch's handler does, but without a traceback, which would hide the message in the summary.
            if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                message = f"{type(error).__name__}: {error}"
                about = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
                with suppress(OSError):
                    Path(file).write_text(json.dumps({"message": about}))
        else:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            handler = get_error_handler()
            handler.initialize()
            handler.record_exception(error)
        raise
