"""Runs that begin alike share their first stages: a branch ends as if it had trained them itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steplm.config import RunConfig
from steplm.errors import CheckpointError, CheckpointMismatch
from steplm.planner.plan import plan
from steplm.training.branch import branch, stage_keys
from steplm.training.run import train

Configure = Callable[..., RunConfig]
Trained = Callable[..., Path]
EqualRuns = Callable[[Path, Path], None]

THREE_STAGES = ("plan.num_stages=3", "plan.layers=[2,1,1]", "train.precision=bf16")


def _keys(configure: Configure, *overrides: str) -> tuple[str, ...]:
    config = configure(Path("nowhere"), *THREE_STAGES, *overrides)
    return stage_keys(config, plan(config))


@pytest.mark.parametrize(
    ("override", "num_shared"),
    [
        ("train.save_steps=1", 3),
        ("eval.eval_steps=1", 3),
        ("name=other", 3),
        ("optim.learning_rate=[1e-2,1e-2,5e-3]", 2),
        ("optim.learning_rate=[1e-2,5e-3,1e-2]", 1),
        ("growth.operator=identity", 1),
        ("growth.position=lower", 2),  # two layers have but one gap
        ("pet.rank=2", 1),
        ("pet.restarts=1", 1),
        ("optim.keep_state_at_growth=false", 1),
        ("plan.layers=[2,1,1]", 3),
        ("plan.layers=[1,2,1]", 0),
        ("plan.total_tokens=2048", 0),
        ("seed=1", 0),
        ("optim.learning_rate=5e-3", 0),
        ("optim.name=apollo_mini", 0),
        ("optim.weight_decay=0", 0),
        ("train.precision=fp32", 0),
        ("train.gradient_accumulation_steps=2", 0),
        ("data.within_documents=true", 0),
    ],
)
def test_keys_agree_up_to_the_first_stage_that_differs(tiny_run: Configure, override: str, num_shared: int) -> None:
    ours, theirs = _keys(tiny_run), _keys(tiny_run, override)
    same = [one == other for one, other in zip(ours, theirs, strict=False)]
    assert same[:num_shared] == [True] * num_shared
    assert not any(same[num_shared:])


@pytest.mark.parametrize(
    ("stage_index", "overrides"),
    [(1, ("growth.position=lower", "pet.rank=2")), (2, ("optim.learning_rate=[1e-2,1e-2,5e-3]",))],
)
def test_a_branch_equals_the_run_that_trained_all_stages_itself(
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    assert_equal_runs: EqualRuns,
    stage_index: int,
    overrides: tuple[str, ...],
) -> None:
    source = trained(*THREE_STAGES)
    alone = train(tiny_run(tmp_path / "alone", *THREE_STAGES, *overrides))
    config = tiny_run(tmp_path / "branch", *THREE_STAGES, *overrides)
    before = (source / "metrics.jsonl").read_bytes()
    branch(source, stage_index, config)
    assert train(config).validation_loss == alone.validation_loss
    assert_equal_runs(tmp_path / "branch", tmp_path / "alone")
    assert (source / "metrics.jsonl").read_bytes() == before


def test_a_run_that_differs_earlier_is_refused(tiny_run: Configure, trained: Trained, tmp_path: Path) -> None:
    source = trained(*THREE_STAGES)
    config = tiny_run(tmp_path / "branch", *THREE_STAGES, "growth.position=lower")
    with pytest.raises(CheckpointMismatch, match="after stage 3"):
        branch(source, 3, config)
    with pytest.raises(CheckpointMismatch, match="after stage 1"):
        branch(source, 1, tiny_run(tmp_path / "branch", *THREE_STAGES, "seed=1"))
    assert not (tmp_path / "branch").exists()


def test_only_a_run_that_has_not_begun_can_branch(tiny_run: Configure, trained: Trained, tmp_path: Path) -> None:
    source = trained(*THREE_STAGES)
    with pytest.raises(CheckpointMismatch, match="has begun"):
        branch(source, 1, tiny_run(source, *THREE_STAGES))
    with pytest.raises(CheckpointError, match="stage4-end"):
        branch(source, 4, tiny_run(tmp_path / "other", *THREE_STAGES))
