"""The settings of instruction tuning, like ``steplm.config`` but in one flat section."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from steplm.config import Section
from steplm.problems import validated
from steplm.yaml_files import apply_override, read_yaml

FULL_LEARNING_RATE, LORA_LEARNING_RATE = 2e-5, 2e-4  # usual for Alpaca and for LoRA
LONGEST_DEFAULT = 1024  # tokens
# Keys that may change when a run resumes; a change in any other key makes it another run.
FREE_AT_RESUME = ("device", "logging_steps", "eval_steps", "save_steps", "save_total_limit")


class SftConfig(Section):
    """Settings of instruction tuning, named as in Hugging Face ``TrainingArguments``."""

    seed: int = Field(0, ge=0, description="of the order of the records, and of adapters")
    chat_template: str | None = Field(
        None,
        description="a Jinja file; alpaca; or none: prompt and completion as they stand. "
        "Default: the tokenizer's own, and alpaca where it has none",
    )
    validation_fraction: float = Field(0.02, ge=0, lt=1, description="share of records held out, by hash; 0: none")
    max_bad_share: float = Field(0.001, ge=0, le=1, description="stop if more records than this share are unusable")
    sequence_length: int | None = Field(
        None, gt=1, description=f"tokens of a record, at most; default: the model's context, {LONGEST_DEFAULT} at most"
    )
    too_long: Literal["truncate", "drop"] = Field("truncate", description="records longer than that: truncate or drop")
    packing: bool = Field(False, description="several records in one sequence, attention inside each")

    lora_rank: int | None = Field(None, gt=0, description="default: all parameters are trained")
    lora_alpha: float | None = Field(None, gt=0, description="default: 2 x lora_rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="on the input of an adapter")

    learning_rate: float | None = Field(
        None, gt=0, description=f"default: {FULL_LEARNING_RATE:g}, with LoRA {LORA_LEARNING_RATE:g}"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="cosine, linear or constant_with_warmup"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0, description="not on norms and biases")
    max_grad_norm: float | None = Field(1.0, gt=0, description="null: no clipping")
    num_train_epochs: float = Field(3.0, gt=0, description="times that each record is seen")
    max_steps: int | None = Field(None, gt=0, description="instead of num_train_epochs")
    per_device_train_batch_size: int = Field(8, gt=0, description="records or packed sequences")
    gradient_accumulation_steps: int = Field(1, gt=0, description="batches per step")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")

    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16 or fp32, of matrix products and frozen weights; trained weights are fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    eval_steps: int | None = Field(None, gt=0, description="steps between held-out losses; default: each epoch")
    save_steps: int | None = Field(None, gt=0, description="default: five times a run")
    save_total_limit: int = Field(2, gt=0, description="checkpoints kept")
    logging_steps: int = Field(10, gt=0, description="steps between log lines; metrics.jsonl has every step")

    @model_validator(mode="after")
    def _consistent(self) -> SftConfig:
        for name in ("lora_alpha", "lora_dropout"):
            if getattr(self, name) and self.lora_rank is None:
                raise ValueError(f"{name}={getattr(self, name):g} is for adapters: set lora_rank, or omit this key")
        if self.max_steps is not None and "num_train_epochs" in self.model_fields_set:
            raise ValueError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs:g} both set the length: "
                "leave one of them out"
            )
        return self

    @property
    def highest_learning_rate(self) -> float:
        return self.learning_rate or (FULL_LEARNING_RATE if self.lora_rank is None else LORA_LEARNING_RATE)

    @property
    def alpha(self) -> float:
        """LoRA's alpha; an adapter's output is scaled by alpha / rank."""
        return self.lora_alpha or 2.0 * (self.lora_rank or 0)


def load_sft_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> SftConfig:
    """Load a YAML file, or the defaults, and apply ``key=value`` overrides.

    Raises:
        ConfigError: lists all problems at once, for unknown keys with the nearest known key.
    """
    values = {} if path is None else read_yaml(Path(path))
    for override in overrides:
        apply_override(values, override)
    return validated(SftConfig, values)
