"""Several ranks train as one process does: the same losses, whatever is cut or copied."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from steplm.checkpoint.folder import load_checkpoint
from steplm.config import RunConfig
from steplm.models.folder import load_hf_config, load_state
from steplm.schedule import Phase
from steplm.training import loop as loop_module
from steplm.training import run as run_module
from steplm.training.assemble import PhaseStart
from steplm.training.context import RunContext
from steplm.training.export import export
from steplm.training.metrics import read_metrics
from steplm.training.run import train
from steplm.types import TrainState

Configure = Callable[..., RunConfig]
Trained = Callable[..., Path]
RunRanks = Callable[..., None]
SameLosses = Callable[..., None]

# One process takes four micro-batches a step, two ranks two, four ranks one. The layers are given: what has the least
# peak depends on the number of devices. At a high learning rate a run of few parameters makes much of a rounding.
BATCH = (
    "train.per_device_train_batch_size=1", "train.global_batch_size=4", "plan.layers=[2,2]", "optim.learning_rate=3e-3",
)  # fmt: skip

CASES = {
    "vanilla": (2, "plan.num_stages=1", "plan.layers=[4]"),
    "three stages": (2, "plan.num_stages=3", "plan.layers=[2,1,1]"),
    "hybrid": (4, "distributed.shard_size=2", "train.gradient_checkpointing=true"),
    "data parallel": (2, "distributed.shard_size=1", "memory.offload_frozen=true"),
    "rows that do not divide": (3, "train.global_batch_size=3", "train.per_device_train_batch_size=1"),
    "tied embeddings under adapters": (2, "model.tie_word_embeddings=true", "plan.train_embeddings=adapters"),
    "fused backward": (
        2, "train.global_batch_size=2", "memory.fused_backward=true", "optim.max_grad_norm=null",
        "train.per_device_train_batch_size=2",
    ),
    "within documents, clipped": (2, "data.within_documents=true", "optim.max_grad_norm=0.3"),
    "fresh new layers, moments kept": (2, "growth.operator=random", "optim.keep_state_at_growth=true"),
    "GaLore on whole matrices": (2, "distributed.shard_size=1", "optim.name=galore", "optim.rank=4"),
    "restarts within a stage": (2, "pet.restarts=1"),
    # Moments start at zero in each block, so Adam's first steps are signs, which rounding decides for gradients near 0.
    "BAdam, copied": (
        2, "distributed.shard_size=1", "plan.num_stages=1", "plan.layers=[4]", "method=badam", "optim.switch_steps=3",
        "optim.adam_epsilon=1e-5",
    ),
    "Muon on whole matrices": (2, "distributed.shard_size=1", "optim.name=muon"),
    "Muon": (3, "train.global_batch_size=3", "optim.name=muon", "pet.rule=muon"),
    "Muon, hybrid": (4, "distributed.shard_size=2", "optim.name=muon"),
    "SCALE": (2, "optim.name=scale"),
}  # fmt: skip


SLOW = ("fused backward", "within documents, clipped", "fresh new layers, moments kept")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_ranks_train_as_one_process_does(
    case: str,
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    run_ranks: RunRanks,
    assert_same_losses: SameLosses,
) -> None:
    size, *overrides = CASES[case]
    one_process = trained(*BATCH, *(key for key in overrides if not key.startswith("distributed")))
    run_ranks(lambda: train(tiny_run(tmp_path, *BATCH, *overrides)), size)
    assert_same_losses(tmp_path, one_process)
    ours, theirs = load_state(tmp_path / "export"), load_state(one_process / "export")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def of_four_ranks(
    tiny_run: Configure, tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks
) -> tuple[Path, list[int]]:
    """A run in bf16, and the bytes of weights that its first rank held when it entered each stage."""
    run_dir, enter = tmp_path_factory.mktemp("four"), run_module.enter
    held = run_dir / "held"

    def entered(run: RunContext, *arguments: object) -> PhaseStart:
        start = enter(run, *arguments)
        if run.world.is_first:
            with held.open("a") as file:
                print(sum(t.untyped_storage().nbytes() for t in start.weights.values()), file=file)
        return start

    def action() -> None:
        run_module.enter = entered
        train(tiny_run(run_dir, *BATCH, "train.precision=bf16"))

    run_ranks(action, 4)
    return run_dir, [int(line) for line in held.read_text().split()]


def test_every_rank_holds_the_planned_bytes(of_four_ranks: tuple[Path, list[int]]) -> None:
    entrances = read_metrics(of_four_ranks[0] / "metrics.jsonl", "stage_start")
    assert len(entrances) == 2
    for entrance in entrances:
        assert entrance["measured_bytes"] == entrance["planned_bytes"]
        assert entrance["measured_bytes_of_ranks"] == [entrance["planned_bytes"]["total"]] * 4


def test_at_growth_no_rank_holds_more_than_its_rows(of_four_ranks: tuple[Path, list[int]]) -> None:
    run_dir, held = of_four_ranks
    hidden_size, vocab_size = 32, load_hf_config(run_dir / "export").vocab_size
    a_layer = hidden_size * (hidden_size + 2 * 16 + hidden_size) + 3 * hidden_size * 48 + 2 * hidden_size
    whole = [2 * (layers * a_layer + hidden_size + 2 * vocab_size * hidden_size) for layers in (2, 4)]
    assert held == [each // 4 for each in whole]


def test_shards_of_any_number_of_ranks_load_as_whole_tensors_and_export_without_ranks(
    of_four_ranks: tuple[Path, list[int]], tmp_path: Path
) -> None:
    run_dir, _ = of_four_ranks
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "stage2-end")
    assert checkpoint.weights["model.embed_tokens.weight"].shape[1] == 32
    assert checkpoint.optimizer["lm_head.weight.exp_avg"].shape == checkpoint.weights["lm_head.weight"].shape
    ours, theirs = load_state(export(run_dir, tmp_path / "again")), load_state(run_dir / "export")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def _until(config: Callable[[], RunConfig], stage: int, step: int) -> Callable[[], None]:
    """An action that is asked to stop, by a signal, after so many steps of a stage."""

    def action() -> None:
        log = loop_module._log_step

        def log_step(run: RunContext, phase: Phase, progress: TrainState, *arguments: object) -> None:
            log(run, phase, progress, *arguments)
            if (phase.stage, progress.step) == (stage, step) and run.world.is_first:
                os.kill(os.getpid(), signal.SIGTERM)

        loop_module._log_step = log_step
        assert train(config()).stop_signal == signal.SIGTERM

    return action


def test_a_run_goes_on_with_other_numbers_of_ranks_within_stages_and_across_growth(
    tiny_run: Configure, trained: Trained, tmp_path: Path, run_ranks: RunRanks, assert_same_losses: SameLosses
) -> None:
    one_process = trained("train.per_device_train_batch_size=4", "train.save_steps=3")

    def config() -> RunConfig:
        return tiny_run(tmp_path, "train.per_device_train_batch_size=2", "train.save_steps=3")

    run_ranks(_until(config, stage=1, step=2), 2)
    run_ranks(_until(config, stage=1, step=4), 1)
    run_ranks(_until(config, stage=2, step=2), 4)
    run_ranks(lambda: train(config()), 2)
    assert_same_losses(tmp_path, one_process)


def test_a_sharded_run_with_8_bit_states_resumes_exactly_and_on_other_numbers_of_ranks(
    tiny_run: Configure, tmp_path: Path, run_ranks: RunRanks, assert_same_losses: SameLosses
) -> None:
    def config(name: str) -> RunConfig:
        in_8_bits = ("optim.name=muon", "memory.optimizer_states=8bit", "model.hidden_size=256")
        return tiny_run(tmp_path / name, *BATCH, "method=growth", "optim.keep_state_at_growth=true", *in_8_bits)

    run_ranks(lambda: train(config("unbroken")), 2)
    run_ranks(_until(lambda: config("broken"), stage=1, step=3), 2)
    shutil.copytree(tmp_path / "broken", tmp_path / "alone")
    run_ranks(_until(lambda: config("broken"), stage=2, step=2), 2)
    run_ranks(lambda: train(config("broken")), 2)
    assert_same_losses(tmp_path / "broken", tmp_path / "unbroken")
    ours, theirs = load_state(tmp_path / "broken" / "export"), load_state(tmp_path / "unbroken" / "export")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    run_ranks(_until(lambda: config("alone"), stage=1, step=4), 1)
    run_ranks(lambda: train(config("alone")), 4)
    # Sums in another order can change an 8-bit code.
    last = [read_metrics(tmp_path / name / "metrics.jsonl", "eval")[-1]["loss"] for name in ("alone", "unbroken")]
    assert last[0] == pytest.approx(last[1], rel=1e-3)
