"""``metrics.jsonl``, with one JSON object per event, and optional sinks that receive the same numbers.

Values of ``event``, and the fields of each:
    data          documents_by_length: training documents of 1, 2 to 3, 4 to 7, ... tokens, including end of text
    stage_start   stage, tokens_seen, num_hidden_layers; planned_bytes, measured_bytes of the model state by kind;
                  measured_bytes_of_ranks on several ranks; planned_peak_bytes; for the dry run planned_dry_run_bytes,
                  measured_dry_run_bytes (tensors) and measured_library_bytes (cuBLAS workspaces); for growth and
                  assembly entrance_peak_allocated_bytes, entrance_peak_reserved_bytes, entrance_peak_resident_bytes
    train         stage, step, num_steps, tokens_seen, loss (mean since the last such event), learning_rate, grad_norm,
                  tokens_per_second, elapsed_seconds, peak_allocated_bytes, peak_reserved_bytes, peak_resident_bytes;
                  ``mfu`` on a GPU in ``steplm.cost.devices``; for a mixture loss_NAME of each source
    skipped       a step without an update: stage, step, tokens_seen, loss, grad_norm (null: not finite),
                  skipped_in_a_row
    eval          stage, step, tokens_seen, loss, perplexity; loss_NAME of each validation set if there are several
    merge         stage, tokens_seen, loss_before, loss_after
    growth        stage, tokens_seen, loss_before, loss_after, operator, position
    pack          stage, tokens_seen, format, num_matrices, relative_rms_error, loss_before, loss_after
    changed       tokens_seen, keys: keys of ``optim``, and eval.max_tokens, that changed at a resume
    stage_end     stage, step, tokens_seen
    run_end       tokens_seen, elapsed_seconds, validation_loss
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from steplm.config import RunConfig
from steplm.errors import ConfigError


class Sink(Protocol):
    """Receives the numbers of each event, with its position in the run."""

    def log(self, values: Mapping[str, float], tokens_seen: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends events to ``metrics.jsonl`` and sends their numbers to the sinks."""

    def __init__(self, path: Path, sinks: list[Sink], *, keep_bytes: int = 0) -> None:
        """Open the log and truncate it to ``keep_bytes``, its length when the checkpoint was written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab")
        # The log may have been shortened or deleted by hand: never let truncate() pad it with zeros.
        self._stream.truncate(min(keep_bytes, self._stream.seek(0, os.SEEK_END)))
        self._stream.seek(0, os.SEEK_END)
        self._sinks = sinks

    @property
    def num_bytes(self) -> int:
        return self._stream.tell()

    def sync(self) -> None:
        """Flush to disk; call before a checkpoint records the length of the log."""
        os.fsync(self._stream.fileno())

    def write(self, event: str, **values: Any) -> None:
        """Write an event; if there are sinks, ``values`` must include its position, ``tokens_seen``."""
        line = json.dumps({"event": event, **values}, separators=(",", ":"), allow_nan=False)
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()
        numbers = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink.log(numbers, values["tokens_seen"])

    def close(self) -> None:
        self._stream.close()
        for sink in self._sinks:
            sink.close()


class NoLog(MetricsLog):
    """The log of every rank but the first: writes nothing."""

    num_bytes = 0

    def __init__(self) -> None: ...

    def sync(self) -> None: ...

    def write(self, event: str, **values: Any) -> None: ...

    def close(self) -> None: ...


def read_metrics(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Read the events of a ``metrics.jsonl``, all or of one kind."""
    if not path.is_file():
        return []
    # A process killed while writing may leave half a line at the end.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    events = [json.loads(line) for line in lines]
    return [entry for entry in events if event in (None, entry["event"])]


class TensorBoardSink:
    """Logs scalars against tokens seen, under ``<run>/tensorboard``."""

    def __init__(self, run_dir: Path, config: RunConfig, tokens_seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a killed process logged after its last checkpoint are logged again.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=tokens_seen)

    def log(self, values: Mapping[str, float], tokens_seen: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, tokens_seen)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Logs to Weights & Biases; a resumed run continues under the ID stored in its directory."""

    def __init__(self, run_dir: Path, config: RunConfig, tokens_seen: int) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
        )

    def log(self, values: Mapping[str, float], tokens_seen: int) -> None:
        self._run.log(dict(values), step=tokens_seen)

    def close(self) -> None:
        self._run.finish()


# name in log.report_to, which is also the package name -> (run_dir, config, tokens seen) -> sink
SINKS: dict[str, Callable[[Path, RunConfig, int], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
}


def require_sinks(names: Iterable[str]) -> None:
    """Fail before the data is prepared if a sink's package is missing.

    Raises:
        ConfigError: a package is not installed.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError:
            raise ConfigError(
                f"log.report_to names {name}, which is not installed: pip install {name}", package=name
            ) from None
