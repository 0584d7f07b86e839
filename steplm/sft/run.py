"""Instruction tuning with ``trl``: turns a Hugging Face folder and instruction records into a chat model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from steplm.data.shards import locked
from steplm.data.tokenizer import load_tokenizer
from steplm.errors import ConfigError, WriteError
from steplm.files import write_atomically, write_errors
from steplm.launch import launched_size
from steplm.models.build import DTYPES
from steplm.models.device import resolve_device
from steplm.models.folder import load_hf_config, load_pretrained, require_plain_weights, without_bars
from steplm.models.forward import check_loss, mean_loss, require_known_tokens, require_positions, usual_length
from steplm.sft.config import SftConfig
from steplm.sft.export import export_model
from steplm.sft.folder import check_same_run, default_output_dir, last_checkpoint, read_marker
from steplm.sft.packing import check_packing
from steplm.sft.prepare import Prepared, batches, prepare_records
from steplm.sft.templates import set_chat_template, template_file
from steplm.sft.types import ModelState, Schedule, SftResult
from steplm.training.environment import environment
from steplm.training.metrics import MetricsLog, read_metrics
from steplm.training.signals import describe_stop, stopping_on_signals
from steplm.units import format_bytes, format_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from trl import SFTTrainer


def instruction_tune(
    model: str | Path,
    data: Sequence[str],
    config: SftConfig | None = None,
    *,
    output_dir: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> SftResult:
    """Train a model on answers to instructions and write ``OUTPUT_DIR/export``; when started again, it resumes.

    Args:
        model: Hugging Face folder or hub name of a decoder-only model.
        data: json, jsonl or parquet files, folders, globs, ``hub://…``; see ``records.py`` for their columns.
        output_dir: default ``runs/NAME-sft``; see ``folder.py`` for its content.
        say: called with each line of progress output.

    Raises:
        ConfigError: trl is not installed, or the settings cannot be combined.
        CheckpointMismatch: the folder holds another run.
        DataError: there is nothing to learn from.
        TrainingDiverged: the loss is not finite.
        WriteError: a file cannot be written.
    """
    config = config or SftConfig()
    hf_config = load_hf_config(model)
    require_plain_weights(hf_config, model)
    sequence_length = check_tuning(config, hf_config)
    device = resolve_device(config.device)
    folder = Path(output_dir) if output_dir is not None else default_output_dir(str(model))
    tokenizer = load_tokenizer(model)
    template = set_chat_template(tokenizer, config.chat_template)
    vocab_size = getattr(hf_config, "vocab_size", math.inf)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token  # labels, not pad tokens, decide what has a loss
    with _write_errors(folder), locked(folder, lambda: say(f"waiting for another process that works in {folder}")):
        resolved = {"sequence_length": sequence_length, "template_sha256": _sha256(tokenizer.chat_template)}
        check_same_run(folder, str(model), data, config, resolved)
        if (folder / "result.json").is_file():
            say(f"{folder} is finished already")
            return _read_result(folder)
        prepared = prepare_records(data, tokenizer, config, sequence_length=sequence_length)
        say(f"data  {_listing(prepared.counts())}; template: {template}")
        for note in prepared.notes:
            say(f"note  {note}")
        run = _Run(str(model), data, config, folder, device, hf_config, tokenizer, prepared, sequence_length, say)
        with _quiet_libraries():
            return run.train()


@dataclass
class _Run:
    model_name: str
    data: Sequence[str]
    config: SftConfig
    folder: Path
    device: torch.device
    hf_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    prepared: Prepared
    sequence_length: int
    say: Callable[[str], None]

    def train(self) -> SftResult:
        from steplm.sft.trainer import Journal, make_trainer, packed

        config = self.config
        model = self._load()
        rows = packed(self.prepared.train, self.sequence_length, config)
        schedule = Schedule.of(config, len(rows))
        trainer = make_trainer(model, self.tokenizer, rows, config, schedule, self.folder, self.device)
        state = ModelState.of(trainer.model, config.precision)
        self.say(self._plan(state, schedule, len(rows)))

        checkpoint = last_checkpoint(self.folder / "checkpoints")
        marker = {"log_bytes": 0, "tokens_seen": 0} if checkpoint is None else read_marker(checkpoint)
        metrics = MetricsLog(self.folder / "metrics.jsonl", [], keep_bytes=marker["log_bytes"])
        journal = Journal(metrics, schedule, config, state, lambda: self._held_out(model), self.say)
        trainer.add_callback(journal)
        try:
            if checkpoint is None:
                metrics.write("run_start", **self._facts(state, schedule, len(rows)))
                journal.evaluate(0)
            else:
                self.say(f"resuming from {checkpoint.name}")
            journal.tokens_before = marker["tokens_seen"]
            with stopping_on_signals(journal):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if journal.requested_signal is not None and trainer.state.global_step < schedule.num_steps:
                self.say(describe_stop(journal.requested_signal))
                return SftResult(self.folder, finished=False, stop_signal=journal.requested_signal)
            return self._finish(trainer, model, metrics, schedule)
        finally:
            metrics.close()

    def _load(self) -> PreTrainedModel:
        """Load the model, in fp32 if its weights are trained, else (with adapters) in the run's precision."""
        dtype = torch.float32 if self.config.lora_rank is None else DTYPES[self.config.precision]
        model = load_pretrained(self.model_name, dtype=dtype).to(self.device)
        model.generation_config = GenerationConfig()  # the trainer's checkpoints would refuse some; see the export
        largest = max(max(example.input_ids) for example in (*self.prepared.train, *self.prepared.validation))
        require_known_tokens(model, max(largest, self.tokenizer.eos_token_id))
        check_loss(model, self.sequence_length)  # for the held-out loss, which never materializes all logits
        if self.config.packing:
            check_packing(model)
        return model

    def _held_out(self, model: PreTrainedModel) -> tuple[float, int] | None:
        """Mean loss over the held-out answer tokens, and their number; adapters live inside ``model``."""
        if not self.prepared.validation:
            return None
        some = batches(self.prepared.validation, self.config.per_device_train_batch_size)
        return mean_loss(model, some)

    def _facts(self, state: ModelState, schedule: Schedule, num_sequences: int) -> dict[str, Any]:
        return {
            "num_steps": schedule.num_steps,
            "num_sequences": num_sequences,
            "num_train_tokens": self.prepared.num_train_tokens,
            "num_answer_tokens": self.prepared.num_answer_tokens,
            "num_trained_parameters": state.num_trained,
            "num_frozen_parameters": state.num_frozen,
            "model_state_bytes": state.num_bytes,
            "sequence_length": self.sequence_length,
            "records": self.prepared.counts(),
            "environment": environment(self.device),
        }

    def _plan(self, state: ModelState, schedule: Schedule, num_sequences: int) -> str:
        prepared = self.prepared
        in_rows = f" in {num_sequences:,} sequences" if self.config.packing else ""
        return (
            f"plan  {schedule.num_steps:,} steps ({schedule.steps_per_epoch:,} an epoch), "
            f"{format_count(prepared.num_train_tokens)} tokens an epoch{in_rows}, "
            f"{format_count(prepared.num_answer_tokens)} of answers; {self.sequence_length} tokens a record at most\n"
            f"plan  {format_count(state.num_trained)} parameters trained, {format_count(state.num_frozen)} frozen: "
            f"model state {format_bytes(state.num_bytes)}, activations not counted"
        )

    def _finish(
        self, trainer: SFTTrainer, model: PreTrainedModel, metrics: MetricsLog, schedule: Schedule
    ) -> SftResult:
        from steplm.sft.trainer import merged

        plain = merged(trainer, self.hf_config.dtype or torch.float32)
        held_out = self._held_out(plain.to(self.device))
        losses = [event["loss"] for event in read_metrics(self.folder / "metrics.jsonl", "train")]
        before = next((event["loss"] for event in read_metrics(self.folder / "metrics.jsonl", "eval")), None)
        result = SftResult(
            self.folder,
            finished=True,
            export_dir=self.folder / "export",
            num_steps=schedule.num_steps,
            train_loss=math.fsum(losses[-schedule.steps_per_epoch :]) / len(losses[-schedule.steps_per_epoch :]),
            validation_loss_before=before,
            validation_loss=None if held_out is None else held_out[0],
        )
        export_model(
            self.folder / "export",
            plain,
            model_name=self.model_name,
            hf_config=self.hf_config,
            tokenizer=self.tokenizer,
            end_ids=self.prepared.end_ids,
            data=self.data,
            config=self.config,
            result=result,
            counts=self.prepared.counts(),
        )
        metrics.write("run_end", **_numbers(result))
        values = asdict(result)
        values.update(output_dir=None, export_dir=None)  # whoever reads the file knows its folder
        write_atomically(self.folder / "result.json", json.dumps(values, indent=1) + "\n")
        self.say(summary(result))
        return result


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn file-system errors into a ``WriteError``, and remove a checkpoint that was being written."""
    try:
        with write_errors(folder):
            yield
    except WriteError:
        last_checkpoint(folder / "checkpoints")
        raise


def summary(result: SftResult) -> str:
    """The last lines of progress output."""
    held_out = "nothing held out"
    if result.validation_loss is not None and result.validation_loss_before is not None:
        held_out = f"held-out loss {result.validation_loss_before:.4f} -> {result.validation_loss:.4f}"
    return (
        f"done  {result.num_steps:,} steps, train loss {result.train_loss:.4f}, {held_out} (nats per token of the "
        f"answers)\ntry   steplm chat {result.export_dir}"
    )


def _numbers(result: SftResult) -> dict[str, float]:
    names = ("num_steps", "train_loss", "validation_loss_before", "validation_loss")
    return {name: value for name in names if (value := getattr(result, name)) is not None}


def _read_result(folder: Path) -> SftResult:
    values = json.loads((folder / "result.json").read_text())
    return SftResult(**{**values, "output_dir": folder, "export_dir": folder / "export"})


def check_tuning(config: SftConfig, hf_config: PretrainedConfig) -> int:
    """Check everything that does not need the model, and return the maximum tokens of a record.

    Raises:
        ConfigError: trl or peft is not installed, the template file does not exist, the sequence length exceeds the
            model's context, or torchrun started the process.
    """
    _require_libraries(config)
    if launched_size() > 1:
        raise ConfigError("instruction tuning runs on one device: start it without torchrun")
    if config.chat_template not in (None, "alpaca", "none"):
        template_file(config.chat_template)
    sequence_length = config.sequence_length or usual_length(hf_config)
    require_positions(hf_config, sequence_length)
    return sequence_length


def _sha256(template: object) -> str | None:
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()


def _require_libraries(config: SftConfig) -> None:
    for name in ("trl", "peft") if config.lora_rank is not None else ("trl",):
        try:
            import_module(name)
        except ImportError:
            raise ConfigError(
                f"instruction tuning needs {name}, which is not installed: pip install '.[sft]'",
                package=name,
            ) from None


def _listing(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "train")


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide progress bars, which would appear between our lines."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with without_bars():
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
