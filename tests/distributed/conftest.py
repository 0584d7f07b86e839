"""Several ranks without a launcher: children of the test that are given what ``torchrun`` gives its processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from steplm.training.metrics import read_metrics


class Ranks:
    """Forked children, one for each rank: that spares them the imports.

    This process must not use a ``DTensor`` itself: its caches would tell every child that it is the rank of this one.
    """

    def __init__(self, action: Callable[[], object], size: int, log: Path) -> None:
        self.log, self.exit_codes = log, dict[int, int]()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.pids = [
            self._start(action, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)
        ]

    def _start(self, action: Callable[[], object], environment: dict[str, str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.environ.update(environment)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # what the test captures is not the child's
        try:
            action()
            os._exit(0)
        except BaseException:
            os.write(log, f"rank {environment['RANK']}: {traceback.format_exc()}".encode())
            os._exit(1)

    def poll(self) -> dict[int, int]:
        """Exit codes, or minus the signals, of the ranks that have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.exit_codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.exit_codes[rank] = os.waitstatus_to_exitcode(status)
        return self.exit_codes

    def wait(self, seconds: float = 120.0) -> list[int]:
        """All exit codes; a rank that has not ended by then is killed."""
        until = time.monotonic() + seconds
        while len(self.poll()) < len(self.pids) and time.monotonic() < until:
            time.sleep(0.02)
        for rank in set(range(len(self.pids))) - set(self.exit_codes):
            os.kill(self.pids[rank], signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)
            self.exit_codes[rank] = -signal.SIGKILL
        return [self.exit_codes[rank] for rank in range(len(self.pids))]


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ranks]:
    """``start_ranks(action, size)``: every rank calls ``action()``."""
    folder = tmp_path_factory.mktemp("ranks")

    def start(action: Callable[[], object], size: int) -> Ranks:
        return Ranks(action, size, folder / f"{time.monotonic_ns()}.log")

    return start


@pytest.fixture(scope="session")
def run_ranks(start_ranks: Callable[..., Ranks]) -> Callable[..., None]:
    """``run_ranks(action, size)``: the same, and every rank must end well."""

    def run(action: Callable[[], object], size: int) -> None:
        ranks = start_ranks(action, size)
        assert ranks.wait() == [0] * size, ranks.log.read_text()

    return run


def _numbers(run_dir: Path) -> dict[tuple, dict[str, float]]:
    """Losses and gradient norms, by event and position in the run."""
    keys = ("loss", "loss_before", "loss_after", "validation_loss", "grad_norm")
    return {
        (entry["event"], entry.get("stage"), entry.get("step"), entry.get("tokens_seen")): {
            key: entry[key] for key in keys if entry.get(key) is not None
        }
        for entry in read_metrics(run_dir / "metrics.jsonl")
        if entry["event"] != "changed"
    }


@pytest.fixture(scope="session")
def assert_same_losses() -> Callable[..., None]:
    """Two run directories hold the same events, with losses within 1e-5 nats, and norms within 1e-4 of theirs."""

    def check(run_dir: Path, one_process: Path) -> None:
        ours, theirs = _numbers(run_dir), _numbers(one_process)
        assert ours.keys() == theirs.keys()
        for position, expected in theirs.items():
            for key, value in expected.items():
                tolerance = {"rel": 1e-4} if key == "grad_norm" else {"rel": 0, "abs": 1e-5}
                assert ours[position][key] == pytest.approx(value, **tolerance), (position, key)

    return check
