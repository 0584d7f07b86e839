"""What the ranks agree on, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import steplm
from steplm.config import DistributedConfig, load_config
from steplm.distributed.world import World, joined, with_world_size
from steplm.errors import ConfigError
from steplm.planner.plan import plan


def test_sums_turns_and_the_first_one_are_the_same_for_all(tmp_path: Path, run_ranks: Callable[..., None]) -> None:
    def action() -> None:
        with joined(DistributedConfig(world_size=3, timeout=1), torch.device("cpu")) as world:
            assert world.sum(world.rank, 0.1) == [3.0, pytest.approx(0.3)]
            assert world.gather(10 * world.rank) == [0, 10, 20]
            assert world.any(world.rank == 2)
            assert not world.any(None)
            with world.first_goes_ahead():
                if world.is_first:
                    time.sleep(0.3)
                    (tmp_path / "made").touch()
                assert (tmp_path / "made").exists()
            with world.in_turn():
                assert len(list(tmp_path.glob("turn*"))) == world.rank
                (tmp_path / f"turn{world.rank}").touch()

    run_ranks(action, 3)


def test_alone_there_is_nothing_to_wait_for() -> None:
    world = World(torch.device("cpu"))
    assert world.sum(2.0, 3.0) == [2.0, 3.0]
    with world.first_goes_ahead(), world.in_turn(), world.patiently():
        world.wait()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"global_batch_size": 6}, "distributed": {"world_size": 4}}, "6 sequences cannot be divided"),
        ({"train": {"global_batch_size": 8, "gradient_accumulation_steps": 2}}, "leave train.gradient_acc"),
        ({"distributed": {"world_size": 6, "shard_size": 4}}, "shard_size=4 does not divide the 6 devices"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(values)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("optim.name=galore",), r"galore works on whole matrices.* set distributed\.shard_size=1"),
        (("method=thawed", "optim.old_layers=apollo_mini"), "apollo_mini works on whole matrices"),
        (("memory.optimizer_states=8bit", "model.intermediate_size=1001"), "2 shards of a matrix of 1001 x 128 would"),
        (("memory.frozen_weights=nf4",), r"memory\.frozen_weights=nf4 keeps whole matrices"),
        (("memory.offload_frozen=true",), r"memory\.offload_frozen keeps whole matrices"),
        (("pet.restarts=1", "pet.restart_keep=0.1"), r"pet\.restart_keep=0\.1 keeps whole matrices"),
        (("plan.num_stages=1", "method=badam"), "badam changes which layers are trained, which FSDP2 does not allow"),
    ],
)
def test_what_needs_whole_tensors_is_refused_where_they_are_divided_and_taken_where_they_are_not(
    overrides: tuple[str, ...], words: str
) -> None:
    values = {"distributed": {"world_size": 2}, "plan": {"total_tokens": "100M"}}
    with pytest.raises(ConfigError, match=words):
        plan(load_config(values, overrides))
    plan(load_config(values, (*overrides, "distributed.shard_size=1")))


def test_a_step_has_the_same_sequences_on_any_number_of_devices() -> None:
    for world_size, micro_batches in ((1, 8), (2, 4), (4, 2), (8, 1), (16, 1)):
        train = {"global_batch_size": 64, "per_device_train_batch_size": 8, "sequence_length": 128}
        config = load_config({"train": train, "distributed": {"world_size": world_size}})
        assert config.step_tokens == 64 * 128
        assert config.micro_batches == micro_batches
        assert config.micro_batch_size * micro_batches * world_size == 64
    assert load_config({"distributed": {"world_size": 4}}).global_batch_size == 32


def test_another_number_of_processes_than_is_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert with_world_size(DistributedConfig()).world_size == 4
    with pytest.raises(ConfigError, match="but 4 processes run"):
        with_world_size(DistributedConfig(world_size=8))


def test_of_a_wrong_configuration_the_first_rank_speaks_and_the_launcher_is_told(tmp_path: Path) -> None:
    error_file = tmp_path / "error.json"
    launched = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(error_file)}
    environment = {**os.environ, "PYTHONPATH": str(Path(steplm.__file__).parents[1]), **launched}
    command = [sys.executable, "-m", "steplm", "train", "quickstart", "plan.num_stage=2"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("rank 0: ConfigError: plan has no key 'num_stage'")
    told = json.loads(error_file.read_text())["message"]
    assert told["message"].startswith("ConfigError: plan has no key 'num_stage'")
    assert told["extraInfo"].keys() == {"timestamp"}  # a stack would be shown in its place


def test_one_launched_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined(DistributedConfig(), torch.device("cpu")) as world:
        assert world.is_alone
        assert not torch.distributed.is_initialized()
