"""Sets up ``trl``'s ``SFTTrainer`` and handles its callbacks; the only module here that needs trl."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer, pack_dataset

from steplm.errors import TrainingDiverged
from steplm.sft.config import SftConfig
from steplm.sft.encode import Example
from steplm.sft.folder import mark_complete
from steplm.sft.types import ModelState, Schedule
from steplm.training.metrics import MetricsLog
from steplm.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def packed(examples: Sequence[Example], sequence_length: int, config: SftConfig) -> Dataset:
    """Training rows: ``input_ids`` and ``labels`` and, with packing, the lengths of the records in each row."""
    rows = Dataset.from_dict(
        {
            "input_ids": [example.input_ids for example in examples],
            "labels": [example.labels for example in examples],
        }
    )
    if not config.packing:
        return rows
    # No record is split: all of them fit the sequence length.
    return pack_dataset(rows.shuffle(seed=config.seed), sequence_length, "bfd")


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    config: SftConfig,
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> SFTTrainer:
    """Create an ``SFTTrainer`` for rows that are already encoded; their labels decide what has a loss."""
    adapters = None
    if config.lora_rank is not None:
        from peft import LoraConfig

        adapters = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.alpha,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's linear layers
            task_type="CAUSAL_LM",
        )
    with warnings.catch_warnings():
        # transformers renames gradient_checkpointing, but its older releases and peft do not know the new name.
        warnings.simplefilter("ignore", FutureWarning)
        arguments = _arguments(config, schedule, folder, device)
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # use only the first of several; trl rejects nn.DataParallel
        trainer = _Trainer(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapters
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: SftConfig, schedule: Schedule, folder: Path, device: torch.device) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder / "checkpoints"),
        seed=config.seed,
        data_seed=config.seed,
        learning_rate=config.highest_learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=math.ceil(config.warmup_ratio * schedule.num_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm or 0.0,
        max_steps=schedule.num_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=config.precision == "bf16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        optim="adamw_torch",
        max_length=None,  # the rows are truncated already
        packing=config.packing,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter would log a different loss
        save_strategy="steps",
        save_steps=schedule.save_steps,
        save_total_limit=config.save_total_limit,
        eval_strategy="no",  # the trainer's loss is a mean over batches; ours is over tokens
        report_to=[],
        disable_tqdm=True,
    )


class _Trainer(SFTTrainer):
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """transformers' schedule, but with warmup from 1 / warmup_steps, as in pre-training, instead of from 0."""
        if self.lr_scheduler is None:
            schedule = super().create_scheduler(num_training_steps, optimizer)
            num_warmup = self.args.get_warmup_steps(num_training_steps)
            (share,) = set(schedule.lr_lambdas)

            def shifted(step: int) -> float:
                return (step + 1) / num_warmup if step < num_warmup else share(step)

            self.lr_scheduler = LambdaLR(schedule.optimizer, shifted)
        return self.lr_scheduler

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none for checkpoints; the export has its own."""


def merged(trainer: SFTTrainer, dtype: torch.dtype) -> PreTrainedModel:
    """The trained model on the CPU, with adapters merged in fp32 and then cast to ``dtype``."""
    model = trainer.model.cpu().float()
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return model.to(dtype)


def measured_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the existing weights, gradients and optimizer states, excluding Adam's step counters."""
    parameters = list(model.parameters())
    tensors = [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim() > 0]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Journal(TrainerCallback):
    """Writes metrics, measures memory, marks checkpoints complete, and stops training on a signal."""

    def __init__(
        self,
        metrics: MetricsLog,
        schedule: Schedule,
        config: SftConfig,
        state: ModelState,
        held_out: Callable[[], tuple[float, int] | None],
        say: Callable[[str], None],
    ) -> None:
        self.metrics = metrics
        self.schedule = schedule
        self.config = config
        self.planned = state
        self.held_out = held_out
        self.say = say
        self.requested_signal: int | None = None
        self.tokens_before = 0  # tokens of the steps before this process
        self.tokens_seen = 0
        self._is_measured = False
        self._started_at = self._told_at = time.monotonic()
        self._first_step = self._told_tokens = 0

    def evaluate(self, step: int) -> None:
        """Log the held-out loss, if any examples are held out."""
        if (result := self.held_out()) is None:
            return
        loss, num_tokens = result
        self.metrics.write("eval", step=step, tokens_seen=self.tokens_seen, loss=loss, num_tokens=num_tokens)
        self.say(f"step {step:,}/{self.schedule.num_steps:,}  held-out loss {loss:.4f} over {num_tokens:,} tokens")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens_seen = self._told_tokens = self.tokens_before
        self._first_step = state.global_step
        self._started_at = self._told_at = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_measured:
            return
        self._is_measured = True
        measured, planned = measured_bytes(kwargs["model"], kwargs["optimizer"]), self.planned.num_bytes
        self.metrics.write("memory", planned_bytes=planned, measured_bytes=measured)
        self.say(f"model state {format_bytes(measured)} measured ({format_bytes(planned)} planned)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested_signal is not None:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss, grad_norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingDiverged(
                f"the loss of step {state.global_step:,} is {loss}, its gradient norm {grad_norm}. Lower learning_rate "
                f"(it is {self.config.highest_learning_rate:g}) or set precision=fp32, in another --output.",
                step=state.global_step,
                loss=loss,
            )
        self.tokens_seen = self.tokens_before + int(logs.get("num_tokens", 0))
        values = {
            "step": state.global_step,
            "epoch": state.epoch,
            "tokens_seen": self.tokens_seen,
            "loss": loss,
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": grad_norm,
        }
        self.metrics.write("train", **values)
        if state.global_step % self.config.logging_steps == 0 or state.global_step == self.schedule.num_steps:
            self._tell(values)
        self._evaluate_if_due(state.global_step)

    def _tell(self, values: dict[str, float]) -> None:
        now = time.monotonic()
        speed = (self.tokens_seen - self._told_tokens) / max(now - self._told_at, 1e-9)
        self._told_at, self._told_tokens = now, self.tokens_seen
        num_left = self.schedule.num_steps - values["step"]
        left = num_left * (now - self._started_at) / (values["step"] - self._first_step)
        self.say(
            f"step {values['step']:,}/{self.schedule.num_steps:,}  loss {values['loss']:.3f}  "
            f"lr {values['learning_rate']:.1e}  grad {values['grad_norm']:.2f}  {format_count(speed)} tok/s  "
            f"left {format_seconds(left)}"
        )

    def _evaluate_if_due(self, step: int) -> None:
        every = self.config.eval_steps or self.schedule.steps_per_epoch
        if step % every == 0 and step < self.schedule.num_steps:  # the last one evaluates the exported model
            self.evaluate(step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.metrics.sync()
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        mark_complete(checkpoint, {"log_bytes": self.metrics.num_bytes, "tokens_seen": self.tokens_seen})
