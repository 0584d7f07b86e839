"""A run of a tiny model: what it learns, what it leaves behind, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

pytest.importorskip("trl", reason="trl is not installed: pip install 'steplm[sft]'")

from steplm.data.tokenizer import load_tokenizer
from steplm.errors import CheckpointMismatch, ConfigError, DataError, TrainingDiverged, WriteError
from steplm.models.folder import load_pretrained, load_state
from steplm.sft import SftResult, instruction_tune, load_sft_config, prepare_records
from steplm.sft.packing import check_packing
from steplm.sft.templates import ALPACA_TEMPLATE, set_chat_template
from steplm.training.metrics import read_metrics

TINY = (
    "precision=fp32", "device=cpu", "learning_rate=1e-2", "validation_fraction=0.2", "logging_steps=1",
    "per_device_train_batch_size=4", "num_train_epochs=2",
)  # fmt: skip


def tune(model: Path, data: Path, output: Path, *overrides: str, say: Callable[[str], None] = print) -> SftResult:
    keys = {item.partition("=")[0]: item for item in (*TINY, *overrides)}
    if "max_steps" in keys:
        del keys["num_train_epochs"]
    config = load_sft_config(None, keys.values())
    return instruction_tune(model, [str(data)], config, output_dir=output, say=say)


@pytest.fixture(scope="module")
def finished(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SftResult:
    return tune(folder, data, tmp_path_factory.mktemp("run") / "out")


def events(result: SftResult, event: str) -> list[dict[str, Any]]:
    return read_metrics(result.output_dir / "metrics.jsonl", event)


def test_a_run_learns_its_answers_and_says_so(finished: SftResult) -> None:
    assert finished.finished
    assert finished.validation_loss is not None
    assert finished.validation_loss_before is not None
    assert finished.validation_loss < finished.validation_loss_before - 0.5
    assert json.loads((finished.output_dir / "result.json").read_text())["train_loss"] == finished.train_loss


def test_the_first_loss_is_the_mean_over_the_answers_tokens(finished: SftResult, folder: Path, data: Path) -> None:
    tokenizer = load_tokenizer(folder)
    set_chat_template(tokenizer, None)
    config = load_sft_config(None, TINY)
    prepared = prepare_records([str(data)], tokenizer, config, sequence_length=128)
    model = load_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for example in prepared.validation:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    first = events(finished, "eval")[0]
    assert first["num_tokens"] == count
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)
    start = events(finished, "run_start")[0]
    assert start["num_train_tokens"] == sum(len(example.input_ids) for example in prepared.train)


def test_every_step_is_logged_and_every_epoch_counts_its_tokens(finished: SftResult) -> None:
    steps, start = events(finished, "train"), events(finished, "run_start")[0]
    assert [event["step"] for event in steps] == list(range(1, start["num_steps"] + 1))
    assert steps[-1]["tokens_seen"] == 2 * start["num_train_tokens"]
    assert math.ceil(start["num_sequences"] / 4) * 2 == start["num_steps"] == finished.num_steps


def test_the_warm_up_begins_above_0_and_the_peak_is_reached(folder: Path, data: Path, tmp_path: Path) -> None:
    result = tune(folder, data, tmp_path / "out", "max_steps=6", "warmup_ratio=0.5", "lr_scheduler_type=linear")
    rates = [event["learning_rate"] for event in events(result, "train")]
    assert rates == pytest.approx([1e-2 * share for share in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3)])


def test_the_one_step_of_a_short_run_is_taken_at_the_full_rate(folder: Path, data: Path, tmp_path: Path) -> None:
    result = tune(folder, data, tmp_path / "out", "max_steps=1")
    assert [event["learning_rate"] for event in events(result, "train")] == [1e-2]
    assert result.export_dir is not None
    before, after = load_state(folder), load_state(result.export_dir)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("share", [0.5, 1.2])  # of the weights' bytes in a checkpoint: they, or the optimizer's, fail
def test_a_refused_write_is_one_line_and_leaves_no_half_checkpoint(
    folder: Path, data: Path, tmp_path: Path, largest_file: Callable[..., Any], share: float
) -> None:
    num_bytes = 4 * sum(tensor.numel() for tensor in load_state(folder).values())
    with largest_file(int(share * num_bytes)), pytest.raises(WriteError, match=r"cannot write .*out") as caught:
        tune(folder, data, tmp_path / "out", "max_steps=2")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out/checkpoints").iterdir()) == []
    assert not (tmp_path / "out/export").exists()
    assert tune(folder, data, tmp_path / "out", "max_steps=2").finished


def test_the_planned_bytes_are_the_measured_ones(finished: SftResult) -> None:
    memory = events(finished, "memory")[0]
    assert memory["planned_bytes"] == memory["measured_bytes"] == events(finished, "run_start")[0]["model_state_bytes"]
    assert memory["planned_bytes"] == 16 * events(finished, "run_start")[0]["num_trained_parameters"]


def test_the_result_is_a_plain_folder_in_the_models_dtype(finished: SftResult, folder: Path) -> None:
    assert finished.export_dir is not None
    before, after = load_state(folder), load_state(finished.export_dir)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in before.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in after.items()
    }
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    model = AutoModelForCausalLM.from_pretrained(finished.export_dir)
    tokenizer = AutoTokenizer.from_pretrained(finished.export_dir)
    assert tokenizer.chat_template == ALPACA_TEMPLATE
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    card = (finished.export_dir / "README.md").read_text()
    assert "held-out loss" in card
    assert str(folder.parent) not in card


def test_a_fresh_process_loads_it_and_talks_with_it(finished: SftResult) -> None:
    program = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "asked = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Say cat.'}], add_generation_prompt=True,"
        " return_tensors='pt', return_dict=True)\n"
        "said = model.generate(**asked, max_new_tokens=8, do_sample=False)\n"
        "print(said.shape[1] > asked['input_ids'].shape[1])\n"
        "from steplm.cli.app import app\n"
        "sys.argv = ['steplm', 'chat', sys.argv[1], '--temperature', '0', '--max-new-tokens', '8', '--device', 'cpu']\n"
        "app()"
    )
    command = [sys.executable, "-c", program, str(finished.export_dir)]
    ended = subprocess.run(command, input="Say cat.\n/quit\n", capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[0] == "True"
    assert len(ended.stdout.splitlines()) > 1


def test_a_finished_run_started_again_trains_nothing(finished: SftResult, folder: Path, data: Path) -> None:
    said: list[str] = []
    again = tune(folder, data, finished.output_dir, say=said.append)
    assert again == finished
    assert said == [f"{finished.output_dir} is finished already"]


@pytest.mark.parametrize("overrides", [(), ("lora_rank=2", "learning_rate=3e-2")])
def test_stopped_and_resumed_it_gives_the_losses_and_weights_of_an_unbroken_run(
    folder: Path, data: Path, tmp_path: Path, overrides: tuple[str, ...], finished: SftResult
) -> None:
    whole = tune(folder, data, tmp_path / "whole", *overrides) if overrides else finished

    def stop_after_the_third_step(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    broken = tune(folder, data, tmp_path / "broken", *overrides, say=stop_after_the_third_step)
    assert (broken.finished, broken.stop_signal) == (False, signal.SIGTERM)
    assert not (tmp_path / "broken/export").exists()
    half = tmp_path / "broken/checkpoints/checkpoint-99"  # of a process killed while it saved
    half.mkdir()
    said: list[str] = []
    resumed = tune(folder, data, tmp_path / "broken", *overrides, say=said.append)
    assert any(line.startswith("resuming from checkpoint-") for line in said)
    assert not half.exists()
    for event, key in (("train", "loss"), ("train", "tokens_seen"), ("train", "grad_norm"), ("eval", "loss")):
        assert [e[key] for e in events(resumed, event)] == pytest.approx(
            [e[key] for e in events(whole, event)], rel=1e-6
        )
    assert resumed.validation_loss == pytest.approx(whole.validation_loss, rel=1e-6)
    assert whole.export_dir is not None
    assert resumed.export_dir is not None
    weights = load_state(whole.export_dir)
    for name, tensor in load_state(resumed.export_dir).items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize(("precision", "frozen_bytes"), [("fp32", 4), ("bf16", 2)])
def test_adapters_are_merged_and_the_frozen_rest_is_as_it_was(
    folder: Path, data: Path, tmp_path: Path, precision: str, frozen_bytes: int
) -> None:
    keys = ("lora_rank=2", "learning_rate=3e-2", "max_steps=6", f"precision={precision}")
    result = tune(folder, data, tmp_path / "out", *keys)
    assert result.export_dir is not None
    before, after = load_state(folder), load_state(result.export_dir)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj." in name}
    start = events(result, "run_start")[0]
    frozen = start["num_frozen_parameters"]
    assert start["model_state_bytes"] == 16 * start["num_trained_parameters"] + frozen_bytes * frozen
    memory = events(result, "memory")[0]
    assert memory["planned_bytes"] == memory["measured_bytes"]
    # What was merged is what was trained: the last held-out loss is below the first.
    assert result.validation_loss is not None
    assert result.validation_loss_before is not None
    assert result.validation_loss < result.validation_loss_before


def test_packed_records_have_the_loss_that_they_have_alone(folder: Path, data: Path, tmp_path: Path) -> None:
    common = ("per_device_train_batch_size=64", "max_steps=1")
    alone = tune(folder, data, tmp_path / "alone", *common)
    packed = tune(folder, data, tmp_path / "packed", *common, "packing=true")
    starts = [events(result, "run_start")[0] for result in (alone, packed)]
    assert starts[0]["num_train_tokens"] == starts[1]["num_train_tokens"]
    assert starts[0]["num_sequences"] > 1.5 * starts[1]["num_sequences"], "the test needs rows of several records"
    # Were a record to see the one before it, random weights this far from uniform would tell.
    assert events(packed, "train")[0]["loss"] == pytest.approx(events(alone, "train")[0]["loss"], rel=1e-5)
    assert events(packed, "train")[0]["tokens_seen"] == starts[0]["num_train_tokens"]


def test_the_step_does_not_depend_on_how_its_batch_is_divided_or_what_is_recomputed(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    ways = (
        ("per_device_train_batch_size=8",),
        ("per_device_train_batch_size=4", "gradient_accumulation_steps=2"),
        ("per_device_train_batch_size=8", "gradient_checkpointing=true"),
    )
    runs = [
        tune(folder, data, tmp_path / str(number), "lora_rank=2", "max_steps=2", "warmup_ratio=0", *way)
        for number, way in enumerate(ways)
    ]
    for key in ("loss", "grad_norm"):
        first, *others = ([event[key] for event in events(run, "train")] for run in runs)
        assert first[1] != first[0]
        assert others == [pytest.approx(first, rel=1e-4)] * 2


def test_a_model_that_lets_records_see_each_other_is_not_packed(folder: Path) -> None:
    model = load_pretrained(folder, dtype=torch.float32)
    check_packing(model)
    forward = model.forward

    def without_positions(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = without_positions
    with pytest.raises(ConfigError, match="would let records attend to each other"):
        check_packing(model)


def test_a_folder_of_another_run_is_refused_with_the_differences(
    finished: SftResult, folder: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointMismatch, match=r"learning_rate: 0\.01 there, 0\.5 now") as caught:
        tune(folder, data, finished.output_dir, "learning_rate=0.5", "logging_steps=5")
    assert caught.value.differing == ["learning_rate"]
    other = tmp_path / data.name
    other.write_text(data.read_text().replace("cat", "cow"))
    with pytest.raises(CheckpointMismatch, match="data: "):
        tune(folder, other, finished.output_dir)


def test_what_is_no_run_of_instruction_tuning_is_left_alone(folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: another run\n")
    with pytest.raises(CheckpointMismatch, match="something other"):
        tune(folder, data, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "name: another run\n"


def test_a_run_that_never_began_may_be_begun_otherwise(folder: Path, data: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text('[{"question": "?"}]')
    with pytest.raises(DataError, match="the columns are question"):
        tune(folder, wrong, tmp_path / "out")
    assert tune(folder, data, tmp_path / "out", "max_steps=1").finished


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("method", ["lora_rank=2", "packing=true"])
def test_other_families_with_tied_heads_train_and_load(
    tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path, family: str, method: str
) -> None:
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    others = {"num_key_value_heads": 2, "intermediate_size": 24} if family == "qwen2" else {}
    config = AutoConfig.for_model(family, **sizes, **others, max_position_embeddings=128)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = tune(tmp_path / "model", data, tmp_path / "out", method, "max_steps=2")
    assert result.export_dir is not None
    before, after = load_state(tmp_path / "model"), load_state(result.export_dir)
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    assert AutoModelForCausalLM.from_pretrained(result.export_dir).config.tie_word_embeddings
    memory = events(result, "memory")[0]
    assert memory["planned_bytes"] == memory["measured_bytes"]


def test_what_a_published_folder_says_of_sampling_and_padding_is_exported(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    """A temperature without do_sample, which transformers reads but refuses to write; a pad token without a row."""
    model = shutil.copytree(folder, tmp_path / "model")
    sampling = {"do_sample": False, "temperature": 0.5, "top_p": 0.9}
    (model / "generation_config.json").write_text(json.dumps(sampling))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "[PAD]"}))
    result = tune(model, data, tmp_path / "out", "max_steps=1")
    written = json.loads((result.export_dir / "generation_config.json").read_text())
    assert {key: written[key] for key in sampling} == sampling
    exported = AutoModelForCausalLM.from_pretrained(result.export_dir)
    assert exported.config.pad_token_id < exported.config.vocab_size


def test_a_loss_that_is_not_finite_ends_the_run(folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="Lower learning_rate"):
        tune(folder, data, tmp_path / "out", "learning_rate=1e30", "warmup_ratio=0", "max_grad_norm=null")


def test_a_sequence_longer_than_the_context_is_refused(folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="128 positions"):
        tune(folder, data, tmp_path / "out", "sequence_length=200")


def test_without_trl_the_extra_is_named(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[sft\]'"):
        tune(folder, data, tmp_path / "out")


def test_the_command_refuses_before_it_loads_anything(steplm: Callable[..., Any], tmp_path: Path) -> None:
    result = steplm("sft", "nowhere/at/all", "--data", "x.json", "lora_rnk=2", cwd=tmp_path)
    assert result.returncode == 2
    assert "Did you mean 'lora_rank'?" in result.stderr
    result = steplm("sft", "nowhere/at/all", "--data", "x.json", cwd=tmp_path)
    assert "no folder nowhere/at/all" in result.stderr
