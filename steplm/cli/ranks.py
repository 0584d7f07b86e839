"""Several processes on one terminal: who speaks, and what the launcher is told of a failure."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from steplm.errors import RankLost, SteplmError
from steplm.launch import is_launched, launched_rank, launched_size

# A wrong configuration is met by every rank. The first one tells it, and the launcher ends the others; as it does with
# those that only know that another one is gone.
SECONDS_OF_SILENCE = 20.0


def who() -> str:
    """What a message of this process begins with: its rank, where there are several."""
    return f"rank {launched_rank()}: " if launched_size() > 1 else ""


@contextmanager
def failure_told_to_launcher() -> Iterator[None]:
    """Where ``torchrun`` started this process, its summary names the rank that failed first, and its error."""
    try:
        yield
    except Exception as error:
        if not is_launched():
            raise
        is_told = launched_rank() != 0 and isinstance(error, SteplmError) and error.exit_code == 2
        if is_told or isinstance(error, RankLost):
            time.sleep(SECONDS_OF_SILENCE)
        if isinstance(error, SteplmError | OSError):
            _tell(f"{type(error).__name__}: {error}")
        else:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            handler = get_error_handler()
            handler.initialize()
            handler.record_exception(error)
        raise


def _tell(message: str) -> None:
    """As PyTorch's handler does, without a stack: the summary would show it in place of the message."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": about}))
