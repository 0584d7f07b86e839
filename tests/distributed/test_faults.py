"""A rank that dies or hangs, a shard that is damaged, a disk that is full: told, and nothing is lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steplm.checkpoint import folder as folder_module
from steplm.checkpoint import shards as shards_module
from steplm.checkpoint.folder import complete_checkpoints, latest_checkpoint
from steplm.config import RunConfig, dump_config
from steplm.schedule import Phase
from steplm.training import loop as loop_module
from steplm.training import run as run_module
from steplm.training.context import RunContext
from steplm.training.metrics import MetricsLog, read_metrics
from steplm.training.run import train
from steplm.types import TrainState

Configure = Callable[..., RunConfig]
RunRanks = Callable[..., None]
SameLosses = Callable[..., None]

OVERRIDES = ("train.per_device_train_batch_size=1", "train.global_batch_size=4", "train.save_steps=2")


@pytest.fixture(scope="module")
def one_process(trained: Callable[..., Path]) -> Path:
    return trained(*OVERRIDES)


def _at_step(stage: int, step: int, rank: int, event: Callable[[], object]) -> None:
    """In this process: ``event`` happens on that rank after that step."""
    log = loop_module._log_step

    def log_step(run: RunContext, phase: Phase, progress: TrainState, *arguments: object) -> None:
        log(run, phase, progress, *arguments)
        if (phase.stage, progress.step, run.world.rank) == (stage, step, rank):
            event()

    loop_module._log_step = log_step


def _latest_checkpoint(run_dir: Path) -> str | None:
    latest = latest_checkpoint(run_dir / "checkpoints")
    return latest and latest.name


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(
    tiny_run: Configure,
    tmp_path: Path,
    start_ranks: Callable,
    run_ranks: RunRanks,
    one_process: Path,
    assert_same_losses: SameLosses,
) -> None:
    def killed() -> None:
        while _latest_checkpoint(tmp_path) != "stage2-step000002":  # it is written beside the next step
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    def dying() -> None:
        _at_step(2, 3, 1, killed)
        train(tiny_run(tmp_path, *OVERRIDES))

    ranks = start_ranks(dying, 2)
    survivor, dead = ranks.wait()
    assert dead == -signal.SIGKILL
    assert survivor == 1
    assert "RankLost: another rank is gone" in ranks.log.read_text()
    assert _latest_checkpoint(tmp_path) == "stage2-step000002"
    run_ranks(lambda: train(tiny_run(tmp_path, *OVERRIDES)), 2)
    assert_same_losses(tmp_path, one_process)


def test_a_rank_that_hangs_ends_the_run_and_every_rank_shows_where_it_stands(
    tiny_run: Configure, tmp_path: Path, start_ranks: Callable
) -> None:
    def never_done() -> None:
        time.sleep(300)

    def hanging() -> None:
        _at_step(1, 3, 1, never_done)
        train(tiny_run(tmp_path, *OVERRIDES, "distributed.timeout=0.08"))

    ranks = start_ranks(hanging, 2)
    assert ranks.wait(60) == [1, 1]
    log = ranks.log.read_text()
    assert "rank 0: no progress for 0.08 minutes" in log
    assert "rank 1: no progress for 0.08 minutes" in log
    assert "in never_done" in log


def test_a_damaged_shard_is_found_and_the_checkpoint_before_it_is_used(
    tiny_run: Configure, tmp_path: Path, run_ranks: RunRanks, one_process: Path, assert_same_losses: SameLosses
) -> None:
    def stopping() -> None:
        _at_step(2, 5, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(tiny_run(tmp_path, *OVERRIDES))

    run_ranks(stopping, 2)
    *_, before, last = complete_checkpoints(tmp_path / "checkpoints")
    shard = sorted((last / "shards").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run_ranks(lambda: train(tiny_run(tmp_path, *OVERRIDES)), 2)
    assert last.with_name(f"{last.name}.damaged").is_dir()
    assert before.name == "stage2-step000004"
    assert_same_losses(tmp_path, one_process)


def _until_full(of: object, name: str, rank: int, number: int) -> None:
    """In this process: that function of a module or class finds the disk full when it is called so often."""
    function, calls = getattr(of, name), iter(range(1, 1000))

    def limited(*arguments: Any, **named: Any) -> object:
        if os.environ["RANK"] == str(rank) and next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments, **named)

    setattr(of, name, limited)


def test_a_full_disk_is_told_wherever_it_is_met_and_the_run_goes_on_when_there_is_space(
    tiny_run: Configure,
    tmp_path: Path,
    start_ranks: Callable,
    run_ranks: RunRanks,
    one_process: Path,
    assert_same_losses: SameLosses,
) -> None:
    checkpoints, told = tmp_path / "checkpoints", "CheckpointError: no space left while writing"

    def log_of_run(*where: Any) -> str:
        def filling() -> None:
            _until_full(*where)
            train(tiny_run(tmp_path, *OVERRIDES))

        ranks = start_ranks(filling, 2)
        assert ranks.wait() == [1, 1]
        return ranks.log.read_text()

    for where in ((folder_module, "_complete", 0, 2), (shards_module.HuggingFaceStorageWriter, "write_data", 1, 1)):
        assert log_of_run(*where).count(f"{told} {checkpoints}/stage1-step000004 ") == 2
        assert [path.name for path in checkpoints.iterdir()] == ["stage1-step000002"]
    log = log_of_run(MetricsLog, "write", 0, 8)  # of step 7, while the checkpoint of step 6 is written
    assert log.count(f"{told} {tmp_path} ") == 1
    assert log.count("RankLost: another rank is gone") == 1
    assert _latest_checkpoint(tmp_path) == "stage1-step000006"
    run_ranks(lambda: train(tiny_run(tmp_path, *OVERRIDES)), 2)
    assert_same_losses(tmp_path, one_process)


def test_torchrun_starts_again_by_itself_when_a_rank_is_killed(
    tiny_run: Configure, tmp_path: Path, one_process: Path, assert_same_losses: SameLosses
) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump_config(tiny_run(tmp_path / "run", *OVERRIDES)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(run_module.__file__).parents[2])}
    with subprocess.Popen(
        [*torchrun, "-m", "steplm", "train", str(run_file)], env=environment, cwd=tmp_path
    ) as process:
        killed = False
        until = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < until:
            if not killed and len(read_metrics(tmp_path / "run" / "metrics.jsonl", "train")) >= 4:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)
                killed = True
            time.sleep(0.01)
        if process.poll() is None:
            process.kill()
    assert killed
    assert process.returncode == 0
    assert_same_losses(tmp_path / "run", one_process)
