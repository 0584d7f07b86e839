"""Every configuration key changes something: an option that is checked but read by nothing is a lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from steplm.config import RunConfig, config_keys, load_config
from steplm.data.prepare import prepare
from steplm.data.tokens import Manifest
from steplm.errors import ConfigError, DataError, PlanInfeasible
from steplm.models.build import hf_config
from steplm.planner.plan import plan
from steplm.planner.solve import SOLVERS
from steplm.training import enter as enter_module
from steplm.training import evaluate as evaluate_module
from steplm.training import loop as loop_module
from steplm.training.display import Display, RichDisplay, make_display
from steplm.training.evaluate import PROBE_WINDOWS
from steplm.training.metrics import read_metrics
from steplm.training.run import train

Configure = Callable[..., RunConfig]

# Keys that change the plan, each with a base and a change on top of it.
CHANGES_PLAN: dict[str, tuple[list[str], str]] = {
    "method": ([], "growth"),
    "model.model_type": ([], "qwen2"),
    "model.hidden_size": ([], "64"),
    "model.intermediate_size": ([], "64"),
    "model.num_hidden_layers": ([], "6"),
    "model.num_attention_heads": ([], "8"),
    "model.num_key_value_heads": ([], "1"),
    "model.vocab_size": ([], "301"),
    "model.tie_word_embeddings": ([], "true"),
    "model.extra": ([], "{attention_bias: true}"),
    "plan.num_stages": ([], "3"),
    "plan.layers": ([], "[1,3]"),
    "plan.count_embeddings": ([], "false"),
    "plan.train_embeddings": ([], "first_stage"),
    "plan.objective": (
        ["train.gradient_checkpointing=true", "train.per_device_train_batch_size=64", "plan.total_tokens=8192"],
        "model_state",
    ),
    "plan.tokens_per_stage": (["plan.total_tokens=null"], "[64,128]"),
    "plan.total_tokens": ([], "2048"),
    "plan.tokens_per_parameter": (["plan.total_tokens=null"], "0.1"),
    "plan.total_flops": (["plan.total_tokens=null"], "2e8"),
    "plan.token_shares": ([], "[1,7]"),
    "plan.grow_at": ([], "0.5"),
    "growth.position": (["plan.layers=[3,1]"], "lower"),
    "pet.method": ([], "none"),
    "pet.warm_start": (["plan.num_stages=1", "method=relora", "pet.restarts=1"], "0.5"),
    "pet.restarts": ([], "1"),
    "pet.rule": ([], "muon"),
    "optim.name": ([], "apollo_mini"),
    "optim.rank": (["optim.name=apollo"], "4"),
    "optim.schedule_over": ([], "run"),
    "optim.old_layers": (["method=thawed", "optim.old_layers=adamw"], "apollo_mini"),
    "pet.rank": ([], "2"),
    "pet.alpha": ([], "1"),
    "pet.target_modules": ([], "[q_proj]"),
    "train.precision": ([], "bf16"),
    "train.sequence_length": ([], "32"),
    "train.per_device_train_batch_size": ([], "2"),
    "train.gradient_accumulation_steps": ([], "2"),
    "train.gradient_accumulation_dtype": (["train.precision=bf16", "train.gradient_accumulation_steps=2"], "fp32"),
    "memory.optimizer_states": ([], "8bit"),
    "memory.master_weights": (["train.precision=bf16"], "false"),
    "memory.fused_backward": (["optim.max_grad_norm=null"], "true"),
    "memory.frozen_weights": ([], "nf4"),
    "memory.offload_frozen": ([], "true"),
    "memory.offload_optimizer": ([], "true"),
    "memory.offload_weights": (["memory.offload_optimizer=true"], "true"),
}

# Keys that change the losses of a run from the same plan.
CHANGES_LOSSES: dict[str, tuple[list[str], str]] = {
    "seed": ([], "1"),
    "model.initializer_range": ([], "0.05"),
    "data.within_documents": ([], "true"),
    "growth.operator": ([], "random"),
    "growth.optimizer_states": ([], "parents"),
    "optim.learning_rate": ([], "[1e-2, 5e-3]"),
    "optim.lr_scheduler_type": ([], "wsd"),
    "optim.update_proj_gap": (["optim.name=galore", "optim.rank=4"], "2"),
    "optim.scale": (["optim.name=apollo_mini"], "1"),
    "optim.switch_steps": (["plan.num_stages=1", "method=badam"], "2"),
    "pet.restart_keep": (["pet.restarts=1"], "0.5"),
    "optim.warmup_ratio": ([], "0.5"),
    "optim.decay_ratio": (["optim.lr_scheduler_type=wsd"], "0.9"),
    "optim.min_lr_ratio": ([], "0.9"),
    "optim.adam_beta1": ([], "0.5"),
    "optim.adam_beta2": ([], "0.5"),
    "optim.adam_epsilon": ([], "1e-2"),
    "optim.weight_decay": ([], "10"),
    "optim.max_grad_norm": ([], "0.01"),
    "optim.keep_state_at_growth": ([], "false"),
    "memory.delay_update": (["memory.offload_optimizer=true"], "true"),
}

# Keys with a test of their own below, or named here with the test that has them.
TESTED_ALONE = {
    "name", "output_dir", "init_from", "model.max_position_embeddings", "plan.solver", "plan.budget",
    "plan.host_budget",  # tests/training/test_offload_optimizer.py
    "data.train", "data.validation", "data.validation_fraction", "data.text_field", "data.tokenizer",
    "data.prepared_dir", "data.max_train_tokens", "data.shard_tokens", "data.max_bad_share", "data.num_workers",
    "train.device", "train.num_threads", "train.gradient_checkpointing", "train.loss_chunk_size", "train.compile",
    "train.dry_run", "train.save_steps", "train.save_minutes", "train.save_total_limit",
    "train.global_batch_size", "distributed.world_size", "distributed.shard_size",  # tests/distributed/test_world.py
    "distributed.timeout",  # tests/distributed/test_faults.py
    "memory.offload_activations", "memory.reserve", "memory.correction",
    "optim.max_skipped_steps", "optim.skip_sigma_factor",  # tests/training/test_skipped_steps.py
    "eval.eval_steps", "eval.max_tokens", "eval.per_device_eval_batch_size",
    "log.logging_steps", "log.progress", "log.report_to", "log.wandb_project",
}  # fmt: skip


def test_every_key_is_shown_to_change_something() -> None:
    shown = [*CHANGES_PLAN, *CHANGES_LOSSES, *TESTED_ALONE]
    assert sorted(shown) == sorted(config_keys())


@pytest.mark.parametrize("key", CHANGES_PLAN)
def test_the_key_changes_the_plan(key: str, tiny_run: Configure, tmp_path: Path) -> None:
    base, value = CHANGES_PLAN[key]
    assert plan(tiny_run(tmp_path, *base)) != plan(tiny_run(tmp_path, *base, f"{key}={value}"))


QUICK = (
    "plan.total_tokens=512", "train.dry_run=false", "train.save_steps=99", "eval.max_tokens=16",
    "eval.per_device_eval_batch_size=32",
)  # fmt: skip


@pytest.mark.parametrize("key", CHANGES_LOSSES)
def test_the_key_changes_the_losses(key: str, trained: Callable[..., Path]) -> None:
    base, value = CHANGES_LOSSES[key]
    one, other = (
        [event["loss"] for event in read_metrics(trained(*QUICK, *overrides) / "metrics.jsonl", "train")]
        for overrides in (base, (*base, f"{key}={value}"))
    )
    assert one != other


# --- data ---


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Manifest]:
    path = tmp_path / "documents.jsonl"
    lines = [{"text": f"document {n} of some words " * 5, "body": f"body {n} " * 30} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(*overrides: str) -> Manifest:
        values = {"model": {"vocab_size": 300}, "data": {"train": [str(path)], "validation_fraction": 0.2}}
        folder = tmp_path / f"prepared-{len(list(tmp_path.glob('prepared-*')))}"
        return prepare(load_config(values, [f"data.prepared_dir={folder}", *overrides]))

    return run


def test_the_data_keys_change_what_is_prepared(prepared: Callable[..., Manifest], tmp_path: Path) -> None:
    base = prepared()
    other = tmp_path / "other.txt"
    other.write_text("quite another text, " * 200)
    assert prepared(f"data.validation={other}").split("validation").num_documents == 1
    assert prepared(f"data.train={other}", f"data.validation={tmp_path}/*.jsonl").split("train").num_documents == 1
    assert (
        prepared("data.validation_fraction=0.6").split("validation").num_documents
        > base.split("validation").num_documents
    )
    assert prepared("data.text_field=body").split("train").num_text_bytes != base.split("train").num_text_bytes
    assert prepared("data.max_train_tokens=100").split("train").num_tokens < base.split("train").num_tokens
    assert len(prepared("data.shard_tokens=50").split("train").shards) > len(base.split("train").shards)
    with pytest.raises((ConfigError, DataError), match="nowhere"):
        prepared("data.tokenizer=./nowhere")


def test_a_share_of_bad_records_is_borne_or_not(prepared: Callable[..., Manifest], tmp_path: Path) -> None:
    with (tmp_path / "documents.jsonl").open("a") as stream:
        stream.write("{broken\n")
    assert prepared("data.max_bad_share=0.5").num_bad_records == 1
    with pytest.raises(DataError):
        prepared("data.max_bad_share=0")


def test_workers_are_as_many_as_asked(prepared: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    from steplm.data import prepare as module

    asked: list[int | None] = []
    original = module.ThreadPoolExecutor

    def counting(max_workers: int | None = None, *args: object, **kwargs: object) -> object:
        asked.append(max_workers)
        return original(max_workers, *args, **kwargs)

    monkeypatch.setattr(module, "ThreadPoolExecutor", counting)
    for workers in (1, 3):
        prepared(f"data.num_workers={workers}")
    assert set(asked) == {1, 3}


# --- names and folders ---


def test_name_and_folders_say_where_a_run_lives() -> None:
    assert load_config({"name": "a"}).run_dir == Path("runs/a")
    assert load_config({"name": "a", "output_dir": "b"}).run_dir == Path("b")
    assert load_config({"data": {"prepared_dir": "c"}}).prepared_dir == Path("c")


def test_max_position_embeddings_is_the_models() -> None:
    values = load_config({}, ["model.max_position_embeddings=2345"]).model.hf_config()
    assert hf_config(values).max_position_embeddings == 2345


def test_the_solver_is_the_one_asked_for(tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the other solver was called")

    monkeypatch.setitem(SOLVERS, "dynamic_programming", refuse)
    assert sum(plan(tiny_run(tmp_path, "plan.solver=integer_programme")).layers) == 4
    with pytest.raises(AssertionError, match="the other solver"):
        plan(tiny_run(tmp_path))


def test_a_plan_above_the_budget_is_refused_with_its_numbers(tiny_run: Configure, tmp_path: Path) -> None:
    reserve = "memory.reserve=1000"
    within = plan(tiny_run(tmp_path, reserve))
    peak_bytes = within.peak_bytes
    assert peak_bytes is not None
    assert plan(tiny_run(tmp_path, reserve, f"plan.budget={peak_bytes + 1000}")) == within
    with pytest.raises(
        PlanInfeasible, match=r"no 2-stage plan fits .* smallest peak .* in stage \d \(weights"
    ) as caught:
        plan(tiny_run(tmp_path, reserve, f"plan.budget={peak_bytes + 999}"))
    assert (caught.value.budget_bytes, caught.value.peak_bytes) == (peak_bytes + 999, peak_bytes)
    assert caught.value.reserve_bytes == 1000
    assert within.stages[caught.value.stage - 1].device_bytes == peak_bytes
    with pytest.raises(PlanInfeasible, match=r"layers 1\+3 do not fit plan\.budget=1\.00 KiB"):
        plan(tiny_run(tmp_path, reserve, "plan.budget=1KiB", "plan.layers=[1,3]"))
    with pytest.raises(
        PlanInfeasible, match=r"leaves nothing for the model, as memory\.reserve=1\.00 KiB is part of it"
    ):
        plan(tiny_run(tmp_path, "memory.reserve=1KiB", "plan.budget=1KiB"))


def test_a_budget_is_for_the_corrected_peak_and_the_reserve(tiny_run: Configure, tmp_path: Path) -> None:
    peak_bytes = plan(tiny_run(tmp_path)).peak_bytes
    assert peak_bytes is not None
    for reserve, correction, needed in ((5, 1.0, peak_bytes + 5), (1000, 2.0, 2 * peak_bytes + 1000)):
        memory = (f"memory.reserve={reserve}", f"memory.correction={correction}")
        assert plan(tiny_run(tmp_path, *memory, f"plan.budget={needed}")).peak_bytes == peak_bytes
        with pytest.raises(PlanInfeasible):
            plan(tiny_run(tmp_path, *memory, f"plan.budget={needed - 1}"))


def test_activations_on_the_host_lower_the_peak_and_change_no_hash(tiny_run: Configure, tmp_path: Path) -> None:
    here, there = (
        plan(tiny_run(tmp_path, "plan.layers=[3,1]", f"memory.offload_activations={value}"))
        for value in ("false", "true")
    )
    assert here.schedule.hash == there.schedule.hash
    assert here.peak_bytes is not None
    assert there.peak_bytes is not None
    assert there.peak_bytes < here.peak_bytes


# --- the loop ---


def test_the_device_is_the_one_asked_for(tiny_run: Configure, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here, and would be used")
    with pytest.raises(ConfigError, match="no CUDA device"):
        train(tiny_run(tmp_path, "train.device=cuda"))


def test_threads_are_as_many_as_asked(tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    train(tiny_run(tmp_path, "train.num_threads=3", "plan.total_tokens=128"))
    assert asked == [3]


def test_how_a_step_is_computed_is_as_asked(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool, int]] = []

    def watch(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def watching(model, *rest):  # type: ignore[no-untyped-def]
            compiled = model.model.layers[0]._compiled_call_impl is not None
            seen.append((model.is_gradient_checkpointing, compiled, rest[-1].chunk_size))
            for layer in model.model.layers:
                layer._compiled_call_impl = None  # compiling itself takes long, and is PyTorch's to test
            return original(model, *rest)

        monkeypatch.setattr(module, name, watching)

    watch(enter_module, "forward_backward")  # of the dry run
    watch(loop_module, "trial")
    one_stage = ("plan.num_stages=1", "plan.total_tokens=64")
    train(tiny_run(tmp_path / "a", *one_stage))
    options = ("train.gradient_checkpointing=true", "train.compile=true", "train.loss_chunk_size=7")
    train(tiny_run(tmp_path / "b", *one_stage, *options))
    train(tiny_run(tmp_path / "c", *one_stage, "train.dry_run=false"))
    # A dry run at the entrance and a trial before the save; no dry run in the third.
    plain, asked, uncompiled = (False, False, 32), (True, True, 7), (True, False, 7)
    assert seen == [plain, plain, asked, uncompiled, plain]


def test_checkpoints_are_as_many_and_as_often_as_asked(tiny_run: Configure, tmp_path: Path) -> None:
    for limit, names in ((1, ["stage1-end", "stage1-step000006"]), (3, [2, 4, 6])):
        run_dir = tmp_path / str(limit)
        overrides = ("plan.num_stages=1", "plan.total_tokens=448", "train.save_steps=2")
        train(tiny_run(run_dir, *overrides, f"train.save_total_limit={limit}"))
        kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        expected = names if limit == 1 else ["stage1-end", *(f"stage1-step{n:06d}" for n in names)]
        assert kept == expected


def test_checkpoints_are_written_by_the_clock_too(tiny_run: Configure, tmp_path: Path) -> None:
    overrides = ("plan.num_stages=1", "plan.total_tokens=448", "train.save_steps=1000", "train.save_total_limit=99")
    for minutes, names in ((1e-9, [*range(1, 7)]), (60, [])):
        run_dir = tmp_path / str(minutes)
        train(tiny_run(run_dir, *overrides, f"train.save_minutes={minutes}"))
        kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert kept == ["stage1-end", *(f"stage1-step{n:06d}" for n in names)]


def test_evaluation_is_as_asked(tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    original = evaluate_module.validation_windows

    def watching(dataset, sequence_length, max_tokens, **keys):  # type: ignore[no-untyped-def]
        asked.append((max_tokens, keys["batch_size"]))
        return original(dataset, sequence_length, max_tokens, **keys)

    monkeypatch.setattr(evaluate_module, "validation_windows", watching)
    options = ("eval.eval_steps=3", "eval.max_tokens=32", "eval.per_device_eval_batch_size=1")
    train(tiny_run(tmp_path, "plan.num_stages=1", "plan.total_tokens=448", *options))
    assert [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl", "eval")] == [3, 6, 7]
    assert set(asked) == {(32, 1), (PROBE_WINDOWS * 16, 1)}


def test_logging_is_as_often_and_as_loud_as_asked(
    tiny_run: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("plan.num_stages=1", "plan.total_tokens=448", "log.logging_steps=3", "log.progress=lines")
    train(tiny_run(tmp_path, *options))
    assert [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl", "train")] == [3, 6, 7]
    assert "stage 1/1  step 3/7  loss" in capsys.readouterr().out
    assert type(make_display("lines")) is Display
    assert type(make_display("rich")) is RichDisplay
    assert make_display("none").console.quiet


def test_tensorboard_gets_the_numbers(tiny_run: Configure, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_run(tmp_path, "plan.total_tokens=512", "log.report_to=tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [event["loss"] for event in read_metrics(tmp_path / "metrics.jsonl", "train")]
    assert [scalar.value for scalar in events.Scalars("train/loss")] == pytest.approx(logged, rel=1e-6)
    starts = [event["tokens_seen"] for event in read_metrics(tmp_path / "metrics.jsonl", "stage_start")]
    assert [scalar.step for scalar in events.Scalars("stage_start/num_hidden_layers")] == starts
    assert starts[-1] > 0


def test_wandb_gets_the_project(tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    started: list[dict] = []
    fake_run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    fake = types.ModuleType("wandb")
    fake.init = lambda **keys: started.append(keys) or fake_run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tiny_run(tmp_path, "plan.total_tokens=128", "log.report_to=wandb", "log.wandb_project=memory"))
    assert started[0]["project"] == "memory"


def test_a_sink_that_is_not_installed_is_named(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install wandb"):
        train(tiny_run(tmp_path, "log.report_to=wandb"))


# init_from: tests/training/test_run.py::test_stage_one_starts_from_given_weights
