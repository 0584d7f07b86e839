"""Progress of active runs, read from the ends of their logs."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class LogTail:
    """The latest training event of a growing ``metrics.jsonl``."""

    path: Path
    latest: dict[str, Any] | None = None
    _offset: int = 0
    _rest: bytes = b""

    def read(self) -> dict[str, Any] | None:
        """Read what was written since the last call, and return ``latest``."""
        try:
            size = self.path.stat().st_size
            if size < self._offset:  # a resumed run truncated its log
                self._offset, self._rest = 0, b""
            with self.path.open("rb") as stream:
                stream.seek(self._offset)
                text = self._rest + stream.read()
                self._offset = stream.tell()
        except OSError:
            return self.latest
        *lines, self._rest = text.split(b"\n")
        for line in lines:
            if line.startswith(b'{"event":"train"'):
                with suppress(ValueError):  # the report rejects damaged lines; a display ignores them
                    self.latest = json.loads(line)
        return self.latest


@dataclass
class Clock:
    """Estimates the time left for a suite from the FLOPs done since it started."""

    started_at: float = field(default_factory=time.monotonic)
    flops_before: float | None = None

    def seconds_left(self, flops_done: float, flops_total: float) -> float | None:
        """``None`` until there is progress to extrapolate from."""
        if self.flops_before is None:
            self.flops_before = flops_done
        done_now = flops_done - self.flops_before
        if done_now <= 0:
            return None
        return (flops_total - flops_done) / done_now * (time.monotonic() - self.started_at)
