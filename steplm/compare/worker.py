"""One run of a suite in its own process: train, score the texts, report the outcome."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path

from steplm.checkpoint.folder import mark_damaged
from steplm.compare.lock import shared_lock
from steplm.compare.scores import EVALUATIONS, content_of, evaluations, is_scored
from steplm.compare.suite import TextConfig
from steplm.config import RunConfig
from steplm.errors import CheckpointError, CheckpointMismatch, SteplmError, TrainingDiverged
from steplm.eval.perplexity import evaluate_folder
from steplm.files import write_atomically
from steplm.training.branch import branch, stage_end
from steplm.training.display import make_display
from steplm.training.run import train


@dataclass(frozen=True)
class Task:
    """The work for one process."""

    config: RunConfig
    texts: Mapping[str, TextConfig]
    lock_file: Path  # held while the process lives
    branch_from: tuple[Path, int] | None = None  # a run directory, and the stage at whose end to start


@dataclass(frozen=True)
class Outcome:
    """How a process ended; a stopped run resumes when it is started again."""

    status: str  # "finished", "diverged", "failed", "stopped", or "again": its starting checkpoint is unusable
    error: str | None = None


def work(task: Task, answer: connection.Connection) -> None:
    """Main function of the process; its output goes to the run's ``log.txt``."""
    gc.freeze()  # what the imports made is never garbage: collections between stages need not look at it
    os.setsid()  # Ctrl-C in the terminal reaches only the suite, which passes it on once
    threading.Thread(target=_stop_with_the_suite, daemon=True).start()
    with shared_lock(task.lock_file):
        outcome = _outcome(task)
    with suppress(OSError):  # the suite may be gone
        answer.send(outcome)


def _outcome(task: Task) -> Outcome:
    try:
        task.config.run_dir.mkdir(parents=True, exist_ok=True)
        _print_to(task.config.run_dir / "log.txt")
    except OSError as error:  # there is no log to write it to
        return Outcome("failed", f"its folder is not writable: {error}")
    try:
        if task.branch_from is not None and (problem := _branched(*task.branch_from, task.config)):
            return Outcome("again", problem)
        result = train(task.config, display=make_display("lines"))
        if result.export_dir is None:
            return Outcome("stopped")
        score(task.config, result.export_dir, task.texts)
        return Outcome("finished")
    except TrainingDiverged as error:
        return Outcome("diverged", str(error))
    except SteplmError as error:
        return Outcome("failed", f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        return Outcome("stopped")
    except Exception as error:
        traceback.print_exc()
        return Outcome("failed", f"{type(error).__name__}: {error}")


def _branched(source_run_dir: Path, stage_index: int, config: RunConfig) -> str | None:
    """Branch off; if the source checkpoint is damaged, mark it so and return the error."""
    try:
        branch(source_run_dir, stage_index, config)
    except CheckpointMismatch:
        raise
    except CheckpointError as error:
        damaged = source_run_dir / "checkpoints" / stage_end(stage_index)
        if damaged.is_dir():
            mark_damaged(damaged)
        return str(error)
    return None


def score(config: RunConfig, model: Path, texts: Mapping[str, TextConfig]) -> None:
    """Score the texts that have no score yet, and add them to ``evaluations.json``."""
    done = evaluations(config.run_dir)
    for name, text in texts.items():
        if is_scored(done, name, text):
            continue
        result = evaluate_folder(
            model,
            text.data,
            text_field=text.text_field,
            max_tokens=text.max_tokens,
            batch_size=config.eval_batch_size,
            device=config.train.device,
        )
        done[name] = {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "num_tokens": result.num_tokens,
            "text": text.model_dump(mode="json"),
            "content": content_of(text),
        }
        write_atomically(config.run_dir / EVALUATIONS, json.dumps(done, indent=1) + "\n")


def _print_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _stop_with_the_suite() -> None:
    """If the suite is killed, make this run save and stop, as it does on the suite's signal."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
