"""Checkpoints of several ranks are written beside training, and read by any number of ranks."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steplm.checkpoint import shards as shards_module
from steplm.checkpoint.shards import BackgroundWriter, TensorFiles
from steplm.config import DistributedConfig
from steplm.distributed.shard import as_global
from steplm.distributed.world import World, joined
from steplm.errors import CheckpointError
from steplm.rows import Rows

TENSORS = {
    "uneven": torch.arange(35.0).view(7, 5),
    "fewer rows than ranks": torch.tensor([1.0, 2.0, 3.0]),
    "bf16": torch.arange(16).to(torch.bfloat16).view(8, 2),
    "scalar": torch.tensor(2.5),
}


def _write(world: World, folder: Path) -> None:
    sharded = {
        name: as_global(world.rows.cut(tensor), world, len(tensor)) if tensor.ndim else tensor
        for name, tensor in TENSORS.items()
    }
    writer = BackgroundWriter(world.rank, world.checkpoint_group)
    writer.start(folder, sharded, prepare=folder.mkdir, finish=lambda files: None)
    writer.wait()


@pytest.mark.parametrize(("size", "shard_size"), [(2, 2), (4, 4), (4, 2), (2, 1)])
def test_what_ranks_write_any_number_of_ranks_reads(
    size: int, shard_size: int, tmp_path: Path, run_ranks: Callable[..., None]
) -> None:
    folder = tmp_path / "shards"

    def action() -> None:
        with joined(DistributedConfig(world_size=size, shard_size=shard_size), torch.device("cpu")) as world:
            _write(world, folder)

    run_ranks(action, size)
    files = TensorFiles(folder)
    assert files.shapes == {name: tensor.shape for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        for count in (1, 2, 3, 4):
            for index in range(count):
                rows = Rows(index, count)
                assert torch.equal(files.read(name, rows), rows.cut(tensor) if tensor.ndim else tensor)


def test_training_goes_on_while_a_checkpoint_is_written_and_what_it_changes_is_not_in_it(
    tmp_path: Path, run_ranks: Callable[..., None]
) -> None:
    folder = tmp_path / "shards"

    def action() -> None:
        save, may_write = shards_module.dcp.save, threading.Event()

        def waiting_save(*arguments: object, **named: object) -> None:
            assert may_write.wait(20)
            save(*arguments, **named)

        shards_module.dcp.save = waiting_save
        with joined(DistributedConfig(world_size=2), torch.device("cpu")) as world:
            weight = torch.ones(2, 3)
            writer = BackgroundWriter(world.rank, world.checkpoint_group)
            tensors = {"weight": as_global(weight, world, 4)}
            writer.start(folder, tensors, prepare=folder.mkdir, finish=lambda files: None)
            weight += 1  # a step, while the disk is slow
            assert world.sum(1.0) == [2.0]  # and a collective
            may_write.set()
            writer.wait()

    run_ranks(action, 2)
    assert torch.equal(TensorFiles(folder).read("weight"), torch.ones(4, 3))


def test_what_fails_on_any_rank_is_raised_on_every_rank(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    def nothing(*arguments: object) -> None: ...

    def action() -> None:
        with joined(DistributedConfig(world_size=2), torch.device("cpu")) as world:

            def refuse(*arguments: object) -> None:
                raise OSError(errno.ENOSPC, "refused", f"by rank {world.rank}")

            def explain(error: Exception) -> Exception:
                return CheckpointError(f"{error}, explained by rank {world.rank}")

            writer = BackgroundWriter(world.rank, world.checkpoint_group)

            def check(name: str, rank: int, finish: Callable[..., None] = nothing) -> None:
                folder, tensors = tmp_path / name, {"weight": as_global(torch.ones(2), world, 4)}

                def discard() -> None:
                    assert world.is_first
                    shutil.rmtree(folder)

                writer.start(folder, tensors, prepare=folder.mkdir, finish=finish, explain=explain, discard=discard)
                with pytest.raises(CheckpointError, match=f"refused.*by rank {rank}.*, explained by rank"):
                    writer.wait()
                writer.wait()  # once is enough

            check("to finish", 0, refuse)
            if world.rank == 1:
                shards_module.sync = refuse
            check("to sync", 1)
            if world.rank == 1:
                shards_module.HuggingFaceStorageWriter.write_data = refuse
            check("to write", 1)

    run_ranks(action, 2)
    assert not list(tmp_path.iterdir())


def test_plain_files_are_read_by_rows_too_and_damaged_ones_are_named(tmp_path: Path) -> None:
    save_file({"weight": TENSORS["uneven"]}, tmp_path / "model.safetensors")
    assert torch.equal(TensorFiles(tmp_path).read("weight", Rows(1, 3)), TENSORS["uneven"][3:6])
    (tmp_path / "other.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TensorFiles(tmp_path)
