"""A longer run, or a decay, from a checkpoint of a shorter one: it ends as if it had been trained as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steplm.checkpoint import verify_checkpoint
from steplm.config import RunConfig, dump_config
from steplm.errors import CheckpointMismatch, ConfigError
from steplm.planner.plan import plan
from steplm.training.extend import decayed, extended
from steplm.training.metrics import read_metrics
from steplm.training.run import train

Configure = Callable[..., RunConfig]
Trained = Callable[..., Path]
EqualRuns = Callable[[Path, Path], None]
# In steps of 64 tokens: 20 in all, 2 of warm-up, 5 of decay.
STABLE = (
    "optim.lr_scheduler_type=wsd",
    "optim.warmup_ratio=0.1",
    "optim.decay_ratio=0.25",
    "train.save_steps=8",
    "train.save_total_limit=1",
    "train.dry_run=false",
    "eval.eval_steps=10",
    "eval.max_tokens=64",
)
ONE_STAGE = (*STABLE, "plan.num_stages=1", "plan.total_tokens=1280")
TWO_STAGES = (*STABLE, "plan.tokens_per_stage=[256,1280]", "plan.total_tokens=null", "train.precision=bf16")
DELAYED = ("memory.offload_optimizer=true", "memory.delay_update=true")
ENDLESS = (*ONE_STAGE, "optim.lr_scheduler_type=constant_with_warmup")


@pytest.mark.parametrize(
    ("overrides", "longer", "name"),
    [
        (ONE_STAGE, ("plan.total_tokens=2560",), "stage1-step000015"),
        ((*ONE_STAGE, "optim.name=muon"), ("plan.total_tokens=2560",), "stage1-step000015"),
        (TWO_STAGES, ("plan.tokens_per_stage=[256,2560]",), "stage2-step000015"),
        # Stages' shares of a total are others: the first stage keeps its tokens.
        (TWO_STAGES, ("plan.tokens_per_stage=null", "plan.total_tokens=2816"), "stage2-step000015"),
        ((*TWO_STAGES, "optim.schedule_over=run"), ("plan.tokens_per_stage=[256,2560]",), "stage2-step000014"),
        (ENDLESS, ("plan.total_tokens=2560",), "stage1-end"),
        (ENDLESS, ("plan.total_tokens=2560", "optim.lr_scheduler_type=wsd"), "stage1-end"),
        # The last update of a stage is never delayed, so the longer run does not start from the end.
        ((*ENDLESS, *DELAYED, "train.save_total_limit=2"), ("plan.total_tokens=2560",), "stage1-step000016"),
    ],
    ids=["plain", "muon", "grown", "shares", "one-schedule", "endless", "endless-decayed", "delayed"],
)
def test_an_extended_run_equals_the_run_that_was_planned_for_its_length(
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    assert_equal_runs: EqualRuns,
    overrides: tuple[str, ...],
    longer: tuple[str, ...],
    name: str,
) -> None:
    source = trained(*overrides)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    config, checkpoint = extended(tiny_run(tmp_path / "long", *overrides, *longer), source)
    assert checkpoint.name == name
    assert train(config, begin=checkpoint).finished
    train(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    assert_equal_runs(tmp_path / "long", tmp_path / "whole")
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    short, long = (read_metrics(run_dir / "metrics.jsonl", "train") for run_dir in (source, tmp_path / "long"))
    assert len(long) > len(short)


@pytest.mark.parametrize(
    ("overrides", "name", "tokens"),
    [
        (ONE_STAGE, "stage1-step000015", 640),
        ((*ONE_STAGE, "train.save_total_limit=9"), "stage1-step000008", 64),
        (ENDLESS, "stage1-end", 320),
        (TWO_STAGES, "stage2-step000015", 320),
        ((*TWO_STAGES, "optim.schedule_over=run"), "stage2-step000014", 320),
    ],
    ids=["plain", "one-step", "endless", "grown", "one-schedule"],
)
def test_a_decayed_checkpoint_equals_the_run_that_was_planned_to_end_there(
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    assert_equal_runs: EqualRuns,
    overrides: tuple[str, ...],
    name: str,
    tokens: int,
) -> None:
    checkpoint = trained(*overrides) / "checkpoints" / name
    config = decayed(checkpoint, tokens, tmp_path / "decayed")
    assert train(config, begin=checkpoint).finished
    train(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    assert_equal_runs(tmp_path / "decayed", tmp_path / "whole")
    rates = [event["learning_rate"] for event in read_metrics(tmp_path / "decayed" / "metrics.jsonl", "train")]
    num_steps = tokens // 64
    assert rates[-num_steps - 1] == 1e-2
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[-num_steps:] == sorted(rates[-num_steps:], reverse=True)


def test_an_extension_that_is_killed_resumes_by_the_same_command(
    tiny_run: Configure, trained: Trained, tmp_path: Path, assert_equal_runs: EqualRuns
) -> None:
    source = trained(*ONE_STAGE)
    longer = ("plan.total_tokens=2560", "train.save_total_limit=99")
    config, checkpoint = extended(tiny_run(tmp_path / "long", *ONE_STAGE, *longer), source)
    train(config, begin=checkpoint)
    for name in ("stage1-end", "stage1-step000032", "stage1-step000030", "stage1-step000024"):  # as a kill leaves it
        (tmp_path / "long" / "checkpoints" / name / "COMPLETE").unlink()
    (tmp_path / "long" / "summary.json").unlink()
    again, checkpoint = extended(tiny_run(tmp_path / "long", *ONE_STAGE, *longer), source)
    assert again == config
    train(again, begin=checkpoint)
    train(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    assert_equal_runs(tmp_path / "long", tmp_path / "whole")


def test_the_checkpoint_before_the_decay_is_kept(trained: Trained) -> None:
    checkpoints = sorted((trained(*ONE_STAGE) / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["stage1-end", "stage1-step000015", "stage1-step000016"]
    for path in checkpoints:
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("overrides", "longer", "message"),
    [
        (("optim.lr_scheduler_type=cosine",), ("plan.total_tokens=2560",), "step 4 had learning rate"),
        ((), ("plan.total_tokens=2560", "seed=1"), "seed: 0 -> 1"),
        ((), ("plan.total_tokens=2560", "optim.weight_decay=0"), "optim.weight_decay"),
        ((), ("plan.total_tokens=2560", "train.gradient_accumulation_steps=2"), "128 here"),
        (("method=relora", "pet.warm_start=0.3", "pet.restarts=1"), ("plan.total_tokens=2560",), "phase 1 of the"),
        ((), ("plan.total_tokens=1280",), "planned for 1,280 tokens"),
        ((), ("plan.total_tokens=2560", "plan.num_stages=2"), r"its number of stages: .* has 1, .* longer run 2"),
        ((), ("plan.total_tokens=2560", "output_dir={source}"), "directory of its own"),
    ],
    ids=["cosine", "seed", "optim", "batch", "relora", "tokens", "stages", "folder"],
)
def test_a_run_that_would_not_have_come_by_the_checkpoint_is_refused(
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    overrides: tuple[str, ...],
    longer: tuple[str, ...],
    message: str,
) -> None:
    source = trained(*ONE_STAGE, *overrides)
    with pytest.raises((CheckpointMismatch, ConfigError), match=message):
        extended(
            tiny_run(tmp_path / "long", *ONE_STAGE, *overrides, *(text.format(source=source) for text in longer)),
            source,
        )
    assert not (tmp_path / "long").exists()


def test_a_checkpoint_within_the_decay_or_an_earlier_stage_is_refused(trained: Trained, tmp_path: Path) -> None:
    checkpoints = trained(*TWO_STAGES) / "checkpoints"
    late = checkpoints / "stage2-step000016"
    with pytest.raises(CheckpointMismatch, match="step 16 of stage 2 had learning rate"):
        train(decayed(late, 640, tmp_path / "late"), begin=late)
    assert not (tmp_path / "late").exists()
    early = trained(*ONE_STAGE, "optim.lr_scheduler_type=cosine") / "checkpoints/stage1-end"
    with pytest.raises(CheckpointMismatch, match="A cosine schedule decays from its first step"):
        train(decayed(early, 640, tmp_path / "cosine"), begin=early)
    with pytest.raises(ConfigError, match="within stage 1 of 2"):
        decayed(checkpoints / "stage1-end", 640, tmp_path / "early")


def test_the_commands_extend_and_decay(
    tiny_run: Configure, trained: Trained, tmp_path: Path, steplm: Callable[..., object]
) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(tiny_run(tmp_path / "short", *ONE_STAGE)))
    longer = ("plan.total_tokens=2560", "output_dir=long", "--extend", trained(*ONE_STAGE))
    assert steplm("train", "run.yaml", *longer, cwd=tmp_path).returncode == 0
    assert plan(tiny_run(tmp_path / "long", *ONE_STAGE, "plan.total_tokens=2560")).total_tokens == 2560
    assert len(read_metrics(tmp_path / "long" / "metrics.jsonl", "train")) == 40
    told = steplm("decay", "long/checkpoints/stage1-step000030", "--tokens", "320", cwd=tmp_path)
    assert told.returncode == 0
    assert len(read_metrics(tmp_path / "long-decay-stage1-step000030" / "metrics.jsonl", "train")) == 35
