"""The processes of a run: ranks, agreement between them, and a watchdog that ends the wait for a rank that hangs."""

from __future__ import annotations

import datetime
import faulthandler
import math
import os
import re
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from steplm.config import DistributedConfig
from steplm.errors import ConfigError, RankLost
from steplm.launch import is_launched, launched_size
from steplm.rows import WHOLE, Rows
from steplm.units import reason

# Messages from gloo and NCCL when the peer process is gone. The errors have no class of their own.
_LOST = re.compile("Connection closed by peer|Connection reset by peer|Broken pipe|ncclRemoteError")

LONG = datetime.timedelta(days=7)  # timeout while the first rank prepares data


@dataclass(frozen=True)
class World:
    """All ranks, as seen from one of them; with the defaults, a single process that calls no collectives."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks of its host
    local_size: int = 1
    rows: Rows = WHOLE  # this rank's rows of every sharded tensor
    mesh: DeviceMesh | None = None  # (replicate, shard); None in a single process
    patient_group: Any = None  # for waits that may take hours
    checkpoint_group: Any = None  # for collectives of the checkpoint thread
    watchdog: Watchdog | None = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.mesh is None

    @property
    def num_replicas(self) -> int:
        return self.size // self.rows.count

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks in fp64; the result is bitwise the same on every rank."""
        self.alive()
        if self.is_alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        self.alive()
        return total.tolist()

    def any(self, flag: object) -> bool:
        """Whether the flag is true on any rank."""
        return self.sum(float(bool(flag)))[0] > 0

    def gather(self, value: float) -> list[float]:
        """The values of all ranks, in rank order."""
        return self.sum(*(value if rank == self.rank else 0.0 for rank in range(self.size)))

    def wait(self) -> None:
        """Wait until every rank gets here."""
        self.sum(0.0)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Run the block on the first rank, which may take hours, then on the others, which can read what it wrote."""
        if self.is_alone:
            yield
            return
        with self.patiently():
            if not self.is_first:
                dist.barrier(self.patient_group)
            yield
            if self.is_first:
                dist.barrier(self.patient_group)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the block on one rank of each host at a time, so that its host memory is needed only once."""
        with self.patiently():
            for turn in range(self.local_size):
                if turn == self.local_rank:
                    yield
                if not self.is_alone:
                    dist.barrier(self.patient_group)

    def alive(self) -> None:
        """Tell the watchdog that this rank is making progress."""
        if self.watchdog is not None:
            self.watchdog.last_sign_at = time.monotonic()

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Suspend the watchdog for work that may take long."""
        if self.watchdog is not None:
            self.watchdog.last_sign_at = math.inf
        yield
        self.alive()


class Watchdog(threading.Thread):
    """Kills the process if it makes no progress for too long, after printing the stacks of its threads."""

    def __init__(self, rank: int, limit_seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.limit_seconds = rank, limit_seconds
        self.last_sign_at = time.monotonic()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(min(1.0, self.limit_seconds / 4)):
            if time.monotonic() - self.last_sign_at > self.limit_seconds:
                told = (
                    f"rank {self.rank}: no progress for {self.limit_seconds / 60:g} minutes (distributed.timeout). "
                    f"Another rank may have died or hung. Stacks of this rank:\n{_stacks()}"
                )
                os.write(sys.stderr.fileno(), told.encode())  # in one write: all ranks print at the same time
                os._exit(1)

    def stop(self) -> None:
        self._done.set()


def _stacks() -> str:
    """The stack of each thread of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def with_world_size(distributed: DistributedConfig) -> DistributedConfig:
    """Set ``world_size`` to the number of launched processes.

    Raises:
        ConfigError: the config states another number.
    """
    size = launched_size()
    if distributed.world_size not in (1, size):
        running = "1 process runs" if size == 1 else f"{size} processes run"
        raise ConfigError(
            f"distributed.world_size={distributed.world_size}, but {running}. Start "
            f"`torchrun --nproc-per-node {distributed.world_size} -m steplm train ...`, or leave the key out: "
            "a run takes its number from torchrun.",
            world_size=distributed.world_size,
            num_processes=size,
        )
    return distributed.model_copy(update={"world_size": size})


@contextmanager
def joined(distributed: DistributedConfig, device: torch.device, *, even_alone: bool = False) -> Iterator[World]:
    """Join the other processes that ``torchrun`` started; a single process sets up nothing.

    Args:
        distributed: config with the actual ``world_size``.
        device: device of this run; with several CUDA devices, each rank takes the one of its ``LOCAL_RANK``.
        even_alone: set up distributed training even for one ``torchrun`` process, to test it or measure its cost.

    Raises:
        RankLost: another process is gone.
    """
    if not is_launched() or (launched_size() == 1 and not even_alone):
        yield World(device)
        return
    rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    seconds = distributed.timeout * 60
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=_store_of_this_attempt(),
        rank=rank,
        world_size=size,
        # Longer than the watchdog's timeout, whose message is more helpful.
        timeout=datetime.timedelta(seconds=2 * seconds),
    )
    num_shards = distributed.num_shards
    mesh = init_device_mesh(device.type, (size // num_shards, num_shards), mesh_dim_names=("replicate", "shard"))
    watchdog = Watchdog(rank, seconds)
    watchdog.start()
    world = World(
        device,
        rank,
        size,
        local_rank,
        local_size,
        Rows(rank % num_shards, num_shards),
        mesh,
        patient_group=dist.new_group(backend="gloo", timeout=LONG),
        checkpoint_group=dist.new_group(backend="gloo"),
        watchdog=watchdog,
    )
    try:
        yield world
        world.wait()  # no rank leaves while another still communicates
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise RankLost(
            f"another rank is gone ({reason(error)}). Its own message tells why, or the launcher's if it was killed. "
            "Run the same command again to resume.",
        ) from None
    finally:
        watchdog.stop()
        dist.destroy_process_group()


def _store_of_this_attempt() -> dist.Store:
    """The launcher's store, with a key prefix that the ranks agree on for this attempt.

    torchrun keeps one store across restarts, in which addresses of dead processes remain (pytorch#135712), and its
    restart count is local to each machine. So the first rank generates a prefix and sends it to every rank that asks.
    Each rank asks under a new random key, so that answers to dead processes cannot be mistaken for its own.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        name = store.get(f"answer/{question}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    name = uuid.uuid4().hex
    silent = set(range(1, size))
    while silent:
        for other in sorted(silent):
            if store.check([f"heard/{name}/{other}"]):
                silent.discard(other)
            elif store.check([f"question/{other}"]):  # may be from a dead process; the live one will ask too
                store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
        time.sleep(0.02)
    return dist.PrefixStore(name, store)
