"""Silences verbose libraries; what matters in their output is reported as an error or a number."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

LOGGERS = ("lm_eval", "datasets", "transformers", "huggingface_hub", "evaluate", "httpx")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress library logs below ERROR, warnings, progress bars and prints."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
