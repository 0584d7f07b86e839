"""Whole runs on the tiny corpus: what a user relies on from the first step to the exported folder."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from steplm.checkpoint import load_checkpoint
from steplm.checkpoint.folder import complete_checkpoints
from steplm.config import DistributedConfig, RunConfig, dump_config, load_written_config
from steplm.data.statistics import document_statistics
from steplm.data.tokens import TokenDataset
from steplm.errors import CheckpointError, CheckpointMismatch, ConfigError, MemoryMismatch, TrainingDiverged
from steplm.models.build import build_model
from steplm.optim import build as build_module
from steplm.pet.adapters import attach, load_adapter_state
from steplm.training import enter as enter_module
from steplm.training import loop as loop_module
from steplm.training import run as run_module
from steplm.training.context import RunContext
from steplm.training.display import make_display
from steplm.training.export import export
from steplm.training.metrics import read_metrics
from steplm.training.run import train

Configure = Callable[..., RunConfig]
Trained = Callable[..., Path]


def _events(run_dir: Path, event: str) -> list[dict]:
    return read_metrics(run_dir / "metrics.jsonl", event)


def losses(run_dir: Path) -> list[float]:
    return [entry["loss"] for entry in _events(run_dir, "train")]


ONE_STAGE = ("plan.num_stages=1", "plan.total_tokens=512")  # each size of step gives the same plan
THREE_STAGES = ("plan.num_stages=3", "plan.layers=[2,1,1]")


@pytest.fixture(scope="module")
def finished(trained: Trained) -> Path:
    """A finished run of three stages, which tests read and do not change."""
    return trained(*THREE_STAGES)


def test_a_run_leaves_a_plain_model_of_full_depth(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert not any("lora" in name for name, _ in model.named_parameters())
    ids = tokenizer("the model grows", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert {"README.md", "generation_config.json", "provenance.json", "plan.json"} <= {
        path.name for path in (finished / "export").iterdir()
    }


def test_exported_logits_equal_those_of_the_training_model(finished: Path) -> None:
    checkpoint = load_checkpoint(complete_checkpoints(finished / "checkpoints")[-1])
    assert checkpoint.state.phase.adapters
    model = build_model(checkpoint.config, checkpoint.weights)
    attach(model, checkpoint.state.phase, "model.layers", seed=0)
    load_adapter_state(model, checkpoint.adapters)
    exported = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, model.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_loss_falls_and_the_summary_tells_the_exported_models_loss(finished: Path) -> None:
    recorded = losses(finished)
    assert recorded[-1] < recorded[0] - 0.5
    summary = json.loads((finished / "summary.json").read_text())
    last = _events(finished, "eval")[-1]
    assert summary["validation_loss"] == pytest.approx(last["loss"], abs=1e-4)
    assert summary["tokens_seen"] == last["tokens_seen"]


def test_the_log_begins_with_the_lengths_of_the_training_documents(finished: Path) -> None:
    dataset = TokenDataset(load_written_config(finished / "config.yaml").prepared_dir, "train")
    first = read_metrics(finished / "metrics.jsonl")[0]
    counts = first["documents_by_length"]
    assert first["event"] == "data"
    assert counts == list(document_statistics(dataset, 16).by_length)
    assert sum(counts) == dataset.num_documents > 1


def test_on_a_known_device_the_log_and_the_summary_tell_its_utilization(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunContext, "_peak_flops", 1e9)
    result = train(tiny_run(tmp_path / "run"))
    flops = {stage.index: stage.phases[0] for stage in result.plan.stages}
    logged = [event for event in read_metrics(tmp_path / "run/metrics.jsonl") if event["event"] == "train"]
    assert logged
    for event in logged:
        flops_per_token = result.plan.cost(flops[event["stage"]]).flops_per_token
        assert event["mfu"] == pytest.approx(flops_per_token * event["tokens_per_second"] / 1e9)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["mfu"] == pytest.approx(result.plan.training_flops / summary["elapsed_seconds"] / 1e9, rel=1e-2)


def test_every_layer_tells_where_it_comes_from(finished: Path) -> None:
    layers = json.loads((finished / "export" / "provenance.json").read_text())
    assert sorted(layer["born_in_stage"] for layer in layers) == [1, 1, 2, 3]
    new = next(layer for layer in layers if layer["born_in_stage"] == 2)
    assert new == {"born_in_stage": 2, "parents": [0, 1], "operator": "interpolation_mean"}


def test_merging_leaves_the_loss_where_it_was(finished: Path) -> None:
    merges = _events(finished, "merge")
    assert [entry["stage"] for entry in merges] == [1, 2, 3]
    for entry in merges:
        assert entry["loss_after"] == pytest.approx(entry["loss_before"], abs=1e-5)
    assert [entry["stage"] for entry in _events(finished, "growth")] == [2, 3]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_measured_bytes_equal_planned_bytes_at_every_stage(
    tiny_run: Configure, tmp_path: Path, num_stages: int, precision: str
) -> None:
    overrides = [f"plan.num_stages={num_stages}", f"train.precision={precision}", "plan.total_tokens=512"]
    result = train(tiny_run(tmp_path, *overrides))
    entrances = _events(tmp_path, "stage_start")
    assert [entry["stage"] for entry in entrances] == list(range(1, num_stages + 1))
    for entry, stage in zip(entrances, result.plan.stages, strict=True):
        assert entry["measured_bytes"] == entry["planned_bytes"]
        assert entry["measured_bytes"]["total"] == stage.memory.total_bytes > 0


def test_a_difference_from_the_plan_stops_the_run(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wasteful(build_module.AdamW):
        def state_tensors(self) -> dict:
            first = next(iter(self.parameters))
            states = super().state_tensors()
            return {**states, first: {**states[first], "extra": torch.zeros(7)}}

    monkeypatch.setattr(build_module, "AdamW", Wasteful)
    with pytest.raises(MemoryMismatch, match="28"):
        train(tiny_run(tmp_path))


@pytest.mark.parametrize(
    "overrides",
    [
        ["plan.layers=[3,1]", "growth.operator=identity"],
        ["plan.layers=[3,1]", "growth.operator=identity", "method=growth"],
        ["plan.layers=[3,1]", "growth.operator=identity", "pet.method=none"],
    ],
)
def test_function_preserving_growth_leaves_the_loss_unchanged(
    tiny_run: Configure, tmp_path: Path, overrides: list[str]
) -> None:
    train(tiny_run(tmp_path, *overrides))
    (growth,) = _events(tmp_path, "growth")
    assert growth["loss_after"] == pytest.approx(growth["loss_before"], abs=1e-6)


@pytest.mark.parametrize("operator", ["interpolation", "stack", "random"])
def test_every_operator_and_position_runs(tiny_run: Configure, tmp_path: Path, operator: str) -> None:
    position = {"interpolation": "lower", "stack": "top", "random": "even"}[operator]
    result = train(
        tiny_run(tmp_path, f"growth.operator={operator}", f"growth.position={position}", "plan.total_tokens=512")
    )
    assert result.export_dir is not None
    assert result.perplexity is not None
    assert result.perplexity < 300


def test_after_growth_every_trained_parameter_moves_and_no_frozen_one(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[int, dict[str, torch.Tensor]] = {}
    last: dict[int, dict[str, torch.Tensor]] = {}
    trained: dict[int, set[str]] = {}
    entrance, save = enter_module.check_entrance, loop_module.save

    def at_entrance(run, phase, start, assembled):  # type: ignore[no-untyped-def]
        first[phase.stage] = {name: p.detach().clone() for name, p in assembled.model.named_parameters()}
        trained[phase.stage] = set(assembled.rules.parameters)
        entrance(run, phase, start, assembled)

    def at_save(run, phase, start, assembled, *rest):  # type: ignore[no-untyped-def]
        last[phase.stage] = {name: p.detach().clone() for name, p in assembled.model.named_parameters()}
        return save(run, phase, start, assembled, *rest)

    monkeypatch.setattr(run_module, "check_entrance", at_entrance)
    monkeypatch.setattr(loop_module, "save", at_save)
    train(tiny_run(tmp_path))
    for stage in (1, 2):
        moved = {name for name in first[stage] if not torch.equal(first[stage][name], last[stage][name])}
        assert moved == trained[stage]
    assert any("lora_A" in name for name in trained[2])
    assert "model.layers.0.mlp.up_proj.weight" not in trained[2]
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= trained[2]


def test_the_old_model_is_gone_before_the_grown_one_is_built(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    enter = enter_module.enter

    def counting(run, phase, before_phase):  # type: ignore[no-untyped-def]
        alive.append(sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects()))
        return enter(run, phase, before_phase)

    # With the collector at rest, as it may be when a model is dropped: nothing may hang on to the old one.
    gc.collect()
    gc.disable()
    before = sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())
    monkeypatch.setattr(run_module, "enter", counting)
    try:
        train(tiny_run(tmp_path))
    finally:
        gc.enable()
    assert alive == [before, before]


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"],
        ["train.gradient_checkpointing=true"],
        ["train.loss_chunk_size=5"],
        ["train.dry_run=false"],
        [
            "data.within_documents=true",
            "train.per_device_train_batch_size=1",
            "train.gradient_accumulation_steps=4",
        ],
    ],
)
def test_the_losses_do_not_depend_on_how_the_step_is_computed(
    tiny_run: Configure, trained: Trained, tmp_path: Path, overrides: list[str]
) -> None:
    same = [key for key in overrides if key.startswith("data.")]
    # The peak, and the layers that make it least, depend on how the step is computed.
    base = ("plan.total_tokens=512", "plan.objective=model_state")
    train(tiny_run(tmp_path, *base, *overrides))
    assert losses(tmp_path) == pytest.approx(losses(trained(*base, *same)), rel=2e-5)


def test_vanilla_and_staged_runs_see_the_same_tokens(tiny_run: Configure, tmp_path: Path) -> None:
    results = [train(tiny_run(tmp_path / str(k), f"plan.num_stages={k}")) for k in (1, 3)]
    assert len({result.plan.total_tokens for result in results}) == 1
    # In stage 1 the data are the same, so the first loss differs by initialisation alone.
    assert all(abs(losses(result.run_dir)[0] - 5.7) < 0.3 for result in results)


def test_the_losses_are_the_golden_ones(finished: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "tiny_run.json"
    recorded = {
        "losses": losses(finished),
        "growth": [[entry["loss_before"], entry["loss_after"]] for entry in _events(finished, "growth")],
    }
    if os.environ.get("STEPLM_UPDATE_GOLDEN"):
        golden.write_text(json.dumps(recorded, indent=1) + "\n")
    expected = json.loads(golden.read_text())
    # Machines differ in the order of their sums: the sixth digit, not more.
    assert recorded["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for actual, wanted in zip(recorded["growth"], expected["growth"], strict=True):
        assert actual == pytest.approx(wanted, rel=1e-5)


# --- what stops a run, and what does not ---


def test_a_finished_run_returns_at_once_and_unchanged(tiny_run: Configure, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    result = train(tiny_run(finished, *THREE_STAGES))
    assert result.finished
    assert result.perplexity is not None
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_nan_stops_the_run_and_names_the_last_good_checkpoint(tiny_run: Configure, tmp_path: Path) -> None:
    # Sound in stage 1; the first update of stage 2 ruins the weights, though its own loss is finite.
    config = tiny_run(tmp_path, "optim.learning_rate=[1e-2,1e25]", "optim.warmup_ratio=0", "train.save_steps=1")
    with pytest.raises(TrainingDiverged, match=r"last good checkpoint is .*stage1-end") as caught:
        train(config)
    weights = load_checkpoint(Path(caught.value.checkpoint)).weights
    assert all(tensor.abs().max() < 1e3 for tensor in weights.values()), "a checkpoint was poisoned"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    # The way out that the message names.
    result = train(tiny_run(tmp_path, "optim.learning_rate=[1e-2,1e-2]", "train.save_steps=1"))
    assert result.finished
    (changed,) = _events(tmp_path, "changed")
    assert "optim.learning_rate: [0.01, 1e+25] -> [0.01, 0.01]" in changed["keys"]


def test_another_configuration_in_the_same_directory_is_refused(
    tiny_run: Configure, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished, run_dir)
    with pytest.raises(CheckpointMismatch, match=r"seed: 0 -> 1"):
        train(tiny_run(run_dir, *THREE_STAGES, "seed=1"))
    with pytest.raises(CheckpointMismatch, match=r"plan\.layers"):
        train(tiny_run(run_dir, "plan.num_stages=3", "plan.layers=[1,2,1]"))
    assert train(tiny_run(run_dir, *THREE_STAGES, "log.logging_steps=7", "train.save_total_limit=1")).finished


def test_steps_of_another_size_are_refused(tiny_run: Configure, trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained(*ONE_STAGE), tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointMismatch, match=r"of 4 sequences a step.* has 2\. Set train\.global_batch_size=4"):
        train(tiny_run(tmp_path, *ONE_STAGE, "train.per_device_train_batch_size=2"))
    half = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")
    assert train(tiny_run(tmp_path, *ONE_STAGE, *half)).finished


def test_a_batch_is_kept_however_often_the_number_of_devices_changes(
    tiny_run: Configure, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, *ONE_STAGE)
    shutil.copytree(trained(*ONE_STAGE), tmp_path, dirs_exist_ok=True)  # 4 sequences a step, on one device
    for _ in range(2):  # the second start finds two devices in config.yaml already
        monkeypatch.setattr(run_module, "with_world_size", lambda distributed: DistributedConfig(world_size=2))
        on_two = run_module._on_these_devices(config)
        assert (on_two.distributed.world_size, on_two.global_batch_size) == (2, 4)
        (tmp_path / "config.yaml").write_text(dump_config(on_two))


def test_two_runs_in_one_directory_are_refused(tiny_run: Configure, tmp_path: Path) -> None:
    with run_module._exclusive(tmp_path), pytest.raises(CheckpointError, match="another process trains"):
        train(tiny_run(tmp_path))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tiny_run: Configure, finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished, run_dir)
    (run_dir / "summary.json").unlink()
    last = complete_checkpoints(run_dir / "checkpoints")[-1]
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    result = train(tiny_run(run_dir, *THREE_STAGES))
    assert result.finished
    assert losses(run_dir) == losses(finished)


def test_a_plan_for_other_weights_than_init_from_is_refused(
    tiny_run: Configure, finished: Path, tmp_path: Path
) -> None:
    given = f"init_from={finished / 'export'}"
    with pytest.raises(ConfigError, match="has embeddings for its own tokenizer"):
        train(tiny_run(tmp_path, given))
    given = (given, f"data.tokenizer={finished / 'export'}")
    with pytest.raises(ConfigError, match="beginning with 4"):
        train(tiny_run(tmp_path, *given))
    deeper = ("model.num_hidden_layers=6", "plan.layers=[4,2]")
    with pytest.raises(ConfigError, match=r"set model\.extra\.rms_norm_eps=1e-06"):
        train(tiny_run(tmp_path, *given, *deeper, "model.extra={rms_norm_eps: 1e-5}"))
    with pytest.raises(ConfigError, match=r"model\.hidden_size"):
        train(tiny_run(tmp_path, *given, *deeper, "model.hidden_size=64"))


def test_stage_one_starts_from_given_weights(
    tiny_run: Configure, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"init_from={finished / 'export'}", f"data.tokenizer={finished / 'export'}", "data.prepared_dir=null")
    monkeypatch.chdir(tmp_path)  # the default folder of prepared data is made here
    result = train(tiny_run(tmp_path, *given, "model.num_hidden_layers=6", "plan.layers=[4,2]"))
    assert result.finished
    assert losses(tmp_path)[0] < losses(finished)[0] - 0.5


def test_export_of_a_middle_checkpoint_has_that_stages_depth(finished: Path, tmp_path: Path) -> None:
    folder = export(finished / "checkpoints" / "stage2-end", tmp_path / "middle")
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 3


def test_export_does_not_overwrite_what_is_no_export(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(CheckpointError, match="not an earlier export"):
        export(finished, tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_a_run_compiles_one_graph_for_each_kind_of_layer(
    tiny_run: Configure, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(tiny_run(tmp_path, "plan.num_stages=3", "train.compile=true"))
    # Whole layers and frozen ones with adapters: over three depths, with evaluations, saves and two exports of them.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses(tmp_path) == pytest.approx(losses(trained("plan.num_stages=3")), rel=1e-5)


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses_across_a_growth(tiny_run: Configure, tmp_path: Path) -> None:
    train(tiny_run(tmp_path / "eager", "plan.total_tokens=512"))
    train(tiny_run(tmp_path / "compiled", "plan.total_tokens=512", "train.compile=true"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_a_source_that_is_repeated_too_often_is_named_before_training(
    tiny_run: Configure, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tiny_corpus.read_text().splitlines(keepends=True)
    for name, part in (("few", lines[:3]), ("many", lines[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sources = [{"name": name, "files": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in ("few", "many")]
    mixture = (f"data.train={json.dumps(sources)}", f"data.prepared_dir={tmp_path / 'prepared'}")
    config = tiny_run(tmp_path / "run", *mixture, "plan.num_stages=1", "plan.total_tokens=4096")
    train(config, display=make_display("lines"))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "is repeated" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("few is repeated ")
