"""``metrics.jsonl``: one JSON object per event, and the optional sinks beside it.

Events, told apart by ``event``:
    stage_start   stage, num_hidden_layers, planned_bytes, measured_bytes
    train         stage, step, tokens_seen, loss (mean since the last such event), learning_rate, grad_norm,
                  tokens_per_second, peak_allocated_bytes, peak_reserved_bytes, peak_resident_bytes
    eval          stage, step, tokens_seen, loss, perplexity
    merge         stage, tokens_seen, loss_before, loss_after
    growth        stage, tokens_seen, loss_before, loss_after, operator, position
    stage_end     stage, step, tokens_seen
    run_end       tokens_seen, elapsed_seconds
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from steplm.errors import ConfigError


class Sink(Protocol):
    """Takes the numbers of one event at one position of the run."""

    def log(self, values: Mapping[str, float], tokens_seen: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends events to ``metrics.jsonl``; numbers go to the sinks too."""

    def __init__(self, path: Path, sinks: list[Sink], *, keep_bytes: int = 0) -> None:
        """Open the log and cut it to ``keep_bytes``, its length when the checkpoint was written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab")
        self._stream.truncate(keep_bytes)
        self._stream.seek(keep_bytes)
        self._sinks = sinks

    @property
    def num_bytes(self) -> int:
        return self._stream.tell()

    def write(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values}, separators=(",", ":"), allow_nan=False)
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()
        numbers = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink.log(numbers, values.get("tokens_seen", 0))

    def close(self) -> None:
        self._stream.close()
        for sink in self._sinks:
            sink.close()


def read_metrics(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The events of a ``metrics.jsonl``, all or of one kind."""
    if not path.is_file():
        return []
    # A process killed while it wrote may leave half a line at the end.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    events = [json.loads(line) for line in lines]
    return [entry for entry in events if event in (None, entry["event"])]


class TensorBoardSink:
    """Scalars over tokens seen, under ``<run>/tensorboard``."""

    def __init__(self, run_dir: Path, project: str, name: str, config: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, values: Mapping[str, float], tokens_seen: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, tokens_seen)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """The same to Weights & Biases, resumed under the run's name."""

    def __init__(self, run_dir: Path, project: str, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", dir=str(run_dir), config=config)

    def log(self, values: Mapping[str, float], tokens_seen: int) -> None:
        self._run.log({**values, "tokens_seen": tokens_seen})

    def close(self) -> None:
        self._run.finish()


# name in log.report_to -> (run_dir, project, run's name, configuration) -> sink
SINKS: dict[str, Callable[[Path, str, str, dict[str, Any]], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
}


def _missing(package: str) -> ConfigError:
    return ConfigError(f"log.report_to names {package}, which is not installed: pip install 'steplm[{package}]'")
