"""``run.yaml`` -> ``RunConfig``: read, validate and resolve what the user wrote.

Values come from, in order of increasing precedence, the defaults here, the YAML file and ``section.key=value``
overrides. ``${NAME}`` and ``${NAME:-default}`` in the YAML are replaced by environment variables.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from steplm.errors import ConfigError
from steplm.old_keys import refuse_old_keys, translate_old_keys
from steplm.problems import keys_of, sections_of, validated
from steplm.units import nearest, parse_bytes, parse_count, shortened
from steplm.yaml_files import apply_override, dump_yaml, read_yaml


def _number_with_unit(units: str) -> dict[str, Any]:
    pattern = rf"^\s*[0-9][0-9_,]*(\.[0-9]+)?([eE][+-]?[0-9]+)?\s*({units})?\s*$"
    return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": pattern}]}


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _schema_of_one_or_many(item: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "array", "items": item}, item]}


# These types accept more than their Python types say; their JSON schemas describe what they accept.
Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0), WithJsonSchema(_number_with_unit("[kKmMbBtTpPeEzZ]"))]
Bytes = Annotated[
    int, BeforeValidator(parse_bytes), Field(gt=0), WithJsonSchema(_number_with_unit("[kKmMgGtT]?[iI]?[bB]"))
]
Texts = Annotated[list[str], BeforeValidator(_one_or_many), WithJsonSchema(_schema_of_one_or_many({"type": "string"}))]
SinkNames = Annotated[
    list[Literal["tensorboard", "wandb"]],
    BeforeValidator(_one_or_many),
    WithJsonSchema(_schema_of_one_or_many({"enum": ["tensorboard", "wandb"]})),
]
Method = Literal["step", "vanilla", "growth", "thawed", "lora", "relora", "badam"]
MethodName = Annotated[Method, WithJsonSchema({"enum": ["auto", *get_args(Method)]})]  # auto: see ``RunConfig._auto``
AutoSize = Annotated[  # auto: resolved in ``load_config``, by ``steplm.planner.auto``
    int, WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"enum": ["auto"]}]})
]
LearningRates = Annotated[  # auto: see ``RunConfig._learning_rate``
    float | list[float],
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}, {"enum": ["auto"]}]}),
]
# The default learning rate is c / hidden_size**p, with (c, p) by update rule; AdamW's for others.
DEFAULT_RATES = {"adamw": (0.7, 1.0), "muon": (0.079, 0.5), "galore": (1.2, 1.0), "apollo_mini": (0.85, 1.0)}
ONE_STAGE_METHODS = ("vanilla", "lora", "relora", "badam")
RuleName = Literal["adamw", "muon", "scale", "galore", "apollo", "apollo_mini"]
Scheduler = Literal["cosine", "warmup_stable_decay", "constant_with_warmup"]
FOLDER_NAME = r"^\.*[\w\-][\w.\-]*$"  # excludes "..", which is another folder
SHORT_SCHEDULER_NAMES = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class ModelConfig(Section):
    """The target model, with the keys of Hugging Face configurations."""

    model_type: str = Field("llama", description="Hugging Face model type: llama, mistral, qwen2, qwen3, gemma, ...")
    hidden_size: int = Field(512, gt=0)
    intermediate_size: int | None = Field(1376, gt=0, description="null: the family has a key of its own, in extra")
    num_hidden_layers: int = Field(12, gt=0, description="depth L of the final model")
    num_attention_heads: int = Field(8, gt=0)
    num_key_value_heads: int | None = Field(None, gt=0, description="default: num_attention_heads")
    vocab_size: int = Field(32000, gt=1)
    max_position_embeddings: int = Field(2048, gt=1)
    tie_word_embeddings: bool | None = Field(False, description="null: as the family does by default")
    initializer_range: float = Field(0.02, gt=0)
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="any further keys of the Hugging Face configuration, e.g. {rope_theta: 5.0e5}",
    )

    def hf_config(self) -> dict[str, Any]:
        """The Hugging Face configuration as a dict, including ``model_type``."""
        values = self.model_dump(exclude={"extra"})
        if values["tie_word_embeddings"] is None:
            del values["tie_word_embeddings"]
        if self.has_default_key_value_heads:
            del values["num_key_value_heads"]
        elif self.num_key_value_heads is None:
            values["num_key_value_heads"] = self.num_attention_heads
        return {**values, **self.extra}

    @property
    def has_default_key_value_heads(self) -> bool:
        """Whether the family's default applies: to a ``config.json`` that does not say."""
        return self.num_key_value_heads is None and "transformers_version" in self.extra


class TextSource(Section):
    """One source of a mixture."""

    name: str = Field(pattern=FOLDER_NAME)
    files: Texts = Field(min_length=1)
    weight: float = Field(gt=0, description="its share of the training tokens, relative to the other weights")


def _or_a_string(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [{"type": schema.pop("type"), "items": schema.pop("items")}, {"type": "string"}]


# The discriminator makes pydantic try only one branch of the union, so that a mistake gives a single message.
Entry = Annotated[
    Annotated[str, Tag("files")] | Annotated[TextSource, Tag("source")],
    Discriminator(lambda value: "source" if isinstance(value, dict | TextSource) else "files"),
]


class DataConfig(Section):
    """Sources of text, and how it becomes token shards."""

    train: Annotated[list[Entry], BeforeValidator(_one_or_many)] = Field(
        default_factory=list,
        json_schema_extra=_or_a_string,
        description="files, globs or folders (json, jsonl, csv, txt, parquet, arrow; compressed too), "
        "hub://OWNER/NAME?name=CONFIG&split=train&revision=COMMIT, or builtin://python-docs; "
        "a mixture: a list of {name, files, weight}",
    )
    validation: Annotated[
        Annotated[Texts, Tag("files")] | Annotated[dict[str, Texts], Tag("sets")],
        Discriminator(lambda value: "sets" if isinstance(value, dict) else "files"),
    ] = Field(
        default_factory=list,
        description="as train; several sets: {NAME: files, ...}; empty: split off by hash of the text",
    )
    validation_fraction: float = Field(0.01, gt=0, lt=1, description="share of documents, used if validation is empty")
    text_field: str = "text"
    tokenizer: str = Field("train", description="a folder, a tokenizer file, a hub name, or 'train' to train BPE here")
    prepared_dir: str | None = Field(
        None, description="folder of the token shards; default: prepared/ and a hash of everything the tokens depend on"
    )
    max_train_tokens: Count | None = Field(None, description="stop preparing after this many training tokens")
    shard_tokens: Count = Field(32_000_000, description="tokens per shard")
    max_bad_share: float = Field(0.001, ge=0, le=1, description="stop if more records than this share are unusable")
    num_workers: int | None = Field(None, gt=0, description="threads that tokenize; default: all cores")
    within_documents: bool = Field(False, description="attention and loss stay inside each document")

    @field_validator("train", "validation")
    @classmethod
    def _usable_names(cls, value: Any) -> Any:
        names = [entry.name for entry in value if isinstance(entry, TextSource)]
        if names and len(names) < len(value):
            raise ValueError("a mixture needs a name, files and a weight for each of its sources")
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"two sources have the name {repeated!r}")
        for name, files in value.items() if isinstance(value, dict) else ():
            if not re.match(FOLDER_NAME, name) or not files:
                raise ValueError(f"a set needs files and a name of letters, digits, '.', '_' and '-', not {name!r}")
        return value

    @property
    def splits(self) -> dict[str, list[str]]:
        """The sources of each split: ``train`` and ``validation``, or e.g. ``train/NAME`` if there are several."""
        texts = [entry for entry in self.train if isinstance(entry, str)]
        sources = {f"train/{entry.name}": entry.files for entry in self.train if isinstance(entry, TextSource)}
        sets = self.validation if isinstance(self.validation, dict) else {}
        named_sets = {f"validation/{name}": files for name, files in sets.items()}
        return (named_sets or {"validation": list(self.validation)}) | (sources or {"train": texts})

    @property
    def train_texts(self) -> list[str]:
        """The entries of all training sources."""
        return [text for name, texts in self.splits.items() if name.startswith("train") for text in texts]

    @property
    def weights(self) -> dict[str, float]:
        """The weights of a mixture by split; empty if the training data are not a mixture."""
        return {f"train/{entry.name}": entry.weight for entry in self.train if isinstance(entry, TextSource)}


TOKEN_BUDGETS = ("tokens_per_stage", "total_tokens", "tokens_per_parameter", "total_flops")  # of ``plan``


class PlanConfig(Section):
    """The number of layers and tokens of each stage."""

    num_stages: int = Field(2, gt=0, description="K; 1 is ordinary (vanilla) pre-training")
    layers: list[Annotated[int, Field(gt=0)]] | None = Field(
        None, description="n_1 ... n_K by hand; default: least memory"
    )
    budget: Bytes | None = Field(
        None, description="refuse a plan whose peak and memory.reserve together need more, e.g. 24GiB"
    )
    host_budget: Bytes | None = Field(
        None, description="refuse a plan that needs more host memory, e.g. 64GiB; default: what the machine has free"
    )
    objective: Literal["peak", "model_state"] = Field(
        "peak", description="what stages minimize: all bytes on the device, or the model state only, as in the paper"
    )
    solver: Literal["dynamic_programming", "integer_programme"] = "dynamic_programming"
    count_embeddings: bool = Field(True, description="false: the paper's bare formula, layers only")
    train_embeddings: Literal["always", "first_stage", "adapters"] = Field(
        "always",
        description="embeddings, final norm and head: trained in every stage, or frozen after stage 1; "
        "adapters: after stage 1 the matrices get LoRA and the norm is trained",
    )
    tokens_per_stage: list[Count] | None = Field(None, description="tokens trained in each stage")
    total_tokens: Count | None = Field(None, description="tokens trained over all stages")
    tokens_per_parameter: float | None = Field(
        None, gt=0, description="total tokens = this x final parameters; default 20"
    )
    total_flops: Count | None = Field(None, description="training FLOPs over all stages, e.g. 1e18")
    token_shares: Literal["layers", "equal"] | list[Annotated[float, Field(gt=0)]] = Field(
        "layers", description="how a total is divided among stages: by depth, equally, or by given weights"
    )
    grow_at: float = Field(0.75, gt=0, le=1, description="share of a stage's schedule done when the model grows")

    @model_validator(mode="after")
    def _consistent(self) -> PlanConfig:
        given = [name for name in TOKEN_BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give one token budget, not {len(given)}: {', '.join(given)}. Set what is not meant to null"
            )
        for name in ("layers", "tokens_per_stage", "token_shares"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.num_stages:
                raise ValueError(f"{name} has {len(value)} entries for num_stages={self.num_stages}")
        return self


class GrowthConfig(Section):
    """How new layers are initialized, and where they are inserted."""

    operator: Literal["interpolation", "interpolation_mean", "stack", "identity", "random"] = "interpolation_mean"
    position: Literal["upper", "intermediate", "lower", "random", "even", "top"] | None = Field(
        None, description="default: upper; stack always goes on top"
    )
    optimizer_states: Literal["fresh", "parents"] = Field(
        "fresh", description="moments of a new layer: zero, or made from its parents' moments like its weights"
    )

    @model_validator(mode="after")
    def _stack_goes_on_top(self) -> GrowthConfig:
        if (self.operator == "stack") != (self.position == "top") and self.position is not None:
            raise ValueError(
                f"operator {self.operator!r} and position {self.position!r} do not go together: "
                "'stack' goes on 'top', and only 'stack' does"
            )
        return self

    @property
    def resolved_position(self) -> str:
        return self.position or ("top" if self.operator == "stack" else "upper")


class PetConfig(Section):
    """Adapters on frozen layers (parameter-efficient training)."""

    method: Literal["lora", "none"] = "lora"
    warm_start: float = Field(0.0, ge=0, lt=1, description="relora: share of the tokens before the first adapters")
    restarts: int = Field(
        0, ge=0, description="relora, step: times that adapters are merged and reinitialized within a stage"
    )
    restart_keep: float = Field(
        0.0, ge=0, le=1, description="share of the adapters' largest moments to keep at a restart"
    )
    rule: RuleName = Field("adamw", description="update rule of the adapters' matrices")
    rank: int = Field(128, gt=0)
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank; default: 4 × rank")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="all-linear, or last parts of module names: [q_proj, v_proj]"
    )


class OptimConfig(Section):
    """The optimizer and its schedule; names as in Hugging Face ``TrainingArguments``."""

    name: RuleName = Field(
        "adamw", description="update rule of the trained layers' matrices; AdamW updates everything else"
    )
    old_layers: RuleName | None = Field(
        None, description="thawed: update rule of the layers from before the last growth"
    )
    rank: int = Field(128, gt=0, description="galore, apollo: rank of the optimizer states")
    update_proj_gap: int = Field(200, gt=0, description="galore, apollo: steps between two projections")
    scale: float | None = Field(
        None, gt=0, description="of a low-rank update; default: galore 0.25, apollo 1, apollo_mini 128 ** 0.5"
    )
    switch_steps: int = Field(100, gt=0, description="badam: steps per block")
    learning_rate: LearningRates = Field(  # type: ignore[assignment]  # a number in every validated ``RunConfig``
        "auto", validate_default=False, description="one for all stages, or one per stage; auto: by rule, width, method"
    )
    lr_scheduler_type: Annotated[
        Scheduler,
        BeforeValidator(lambda value: SHORT_SCHEDULER_NAMES.get(value, value) if isinstance(value, str) else value),
        WithJsonSchema({"enum": [*get_args(Scheduler), *SHORT_SCHEDULER_NAMES]}),
    ] = Field("cosine", description="cosine, warmup_stable_decay (short: wsd) or constant_with_warmup (constant)")
    schedule_over: Literal["stage", "run"] = Field(
        "stage", description="each stage has its own schedule; run: one over all stages, with a warm-up in each"
    )
    warmup_ratio: float | list[float] = Field(
        0.05, description="share of a stage's scheduled steps, or of a restart's own; one, or one per stage"
    )
    decay_ratio: float | list[float] = Field(
        0.2, description="share of decay steps, for warmup_stable_decay; one, or one per stage"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate / highest learning rate")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices only, not on norms and biases")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="null: no clipping; memory.fused_backward uses the norm of the previous step"
    )
    max_skipped_steps: int = Field(
        3, ge=0, description="consecutive steps with a non-finite loss or gradient, skipped before the run stops"
    )
    skip_sigma_factor: float | None = Field(
        None,
        gt=0,
        description="skip a step whose gradient norm is more than so many standard deviations above the mean of the "
        "last 128 steps, e.g. 6; default: none is skipped",
    )
    keep_state_at_growth: bool = Field(
        True, description="keep the optimizer state of parameters that are still trained after a growth"
    )

    @field_validator("learning_rate", "decay_ratio", "warmup_ratio")
    @classmethod
    def _in_range(cls, value: float | list[float], info: ValidationInfo) -> float | list[float]:
        values = value if isinstance(value, list) else [value]
        if info.field_name != "warmup_ratio" and min(values, default=1) <= 0:
            raise ValueError("must be greater than 0")
        if info.field_name == "decay_ratio" and max(values, default=0) > 1:
            raise ValueError("must be at most 1")
        if info.field_name == "warmup_ratio" and not all(0 <= ratio < 1 for ratio in values):
            raise ValueError("must be at least 0 and less than 1")
        return value


class TrainConfig(Section):
    """The training loop."""

    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16: with fp32 master weights (2+2+12 bytes)")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = Field(None, gt=0, description="CPU threads; default: PyTorch's own")
    sequence_length: int = Field(1024, gt=1, description="tokens")
    per_device_train_batch_size: AutoSize = Field(
        8, gt=0, description="sequences in one forward pass; auto: the most that fit plan.budget or the GPU"
    )
    gradient_accumulation_steps: int = Field(1, gt=0)
    gradient_accumulation_dtype: Literal["param", "fp32"] = Field(
        "param", description="type in which micro-batches' gradients are summed: the parameters' own, or fp32"
    )
    global_batch_size: int | None = Field(
        None,
        gt=0,
        description="sequences of one step over all devices; default: the product of the two above and the world size",
    )
    gradient_checkpointing: bool | Literal["frozen", "new"] = Field(
        False, description="recompute activations in the backward pass: of all layers, or of frozen or new ones alone"
    )
    loss_chunk_size: AutoSize = Field(
        512, gt=0, description="rows of logits that exist at once; auto: the most that do not raise the planned peak"
    )
    compile: bool = Field(False, description="torch.compile each layer")
    dry_run: bool = Field(True, description="one batch, forward and backward, before the first step of each stage")
    save_steps: int | None = Field(None, gt=0, description="default: five times a stage; stage ends are always saved")
    save_minutes: float | None = Field(None, gt=0, description="also save this many minutes after the last save")
    save_total_limit: int = Field(
        2, gt=0, description="checkpoints kept in addition to the stage ends and to the one before a decay"
    )


class MemoryConfig(Section):
    """What is kept in device memory, and in which format. Each key trades time or quality for memory."""

    optimizer_states: Literal["fp32", "8bit"] = Field(
        "fp32", description="Adam's moments: 4 bytes each, or 1 byte in blocks of 256 with one scale"
    )
    master_weights: bool | Literal["8bit"] | RuleName = Field(
        True,
        description="false: no fp32 copy of bf16 weights, updates are rounded stochastically; 8bit: one byte of what "
        "rounding lost, in place of four; the name of an update rule: only its weights keep an fp32 copy",
    )
    fused_backward: bool = Field(
        False, description="update each parameter inside the backward pass, so that gradients never all exist"
    )
    frozen_weights: Literal["full", "int8", "nf4"] = Field(
        "full", description="matrices of frozen layers: as trained, or 1 or 0.53 bytes a parameter"
    )
    offload_frozen: bool = Field(
        False, description="keep matrices of frozen layers in host memory and fetch them one layer ahead"
    )
    offload_activations: bool = Field(False, description="keep activations in host memory until the backward pass")
    offload_optimizer: bool = Field(
        False,
        description="keep optimizer states, master weights and the sums of gradients in host memory, and update there",
    )
    offload_weights: bool = Field(
        False, description="also keep matrices of trained layers in host memory and fetch them one layer ahead"
    )
    delay_update: bool = Field(
        False, description="let the CPU compute an update during the next step, which still uses the old weights"
    )
    reserve: Bytes = Field(
        5 * 2**28, description="context, libraries and fragmentation of the device; added to the peak in every budget"
    )
    correction: float = Field(
        1.0, gt=0, description="measured / planned peak on your device, from `steplm plan --calibrate`"
    )

    @property
    def packs_frozen(self) -> bool:
        """Whether frozen weights are quantized or offloaded, instead of plain parameters on the device."""
        return self.frozen_weights != "full" or self.offload_frozen

    @property
    def fetches_layers(self) -> bool:
        """Whether layers cannot all be on the device as plain weights."""
        return self.packs_frozen or self.offload_weights

    def needed_bytes(self, peak_bytes: int) -> int:
        """The device memory needed for a planned peak, including the correction and the reserve."""
        return math.ceil(peak_bytes * self.correction) + self.reserve


class DistributedConfig(Section):
    """Training one model on several devices, with processes started by ``torchrun``."""

    world_size: int = Field(1, gt=0, description="devices; a run takes it from torchrun, `steplm plan` from here")
    shard_size: int | None = Field(
        None, gt=0, description="devices that share one copy of the model state, at most; default: all; 1: no sharding"
    )
    timeout: float = Field(10.0, gt=0, description="minutes without an answer after which a rank counts as hanging")

    @property
    def num_shards(self) -> int:
        """The number of devices that share one copy of the model state."""
        return min(self.shard_size or self.world_size, self.world_size)


class EvalConfig(Section):
    """Validation during and after training."""

    eval_steps: int | None = Field(None, gt=0, description="default: ten times a stage")
    max_tokens: Count | None = Field(None, description="validation tokens per evaluation; default: all")
    per_device_eval_batch_size: int | None = Field(None, gt=0, description="default: the training batch size")


class LogConfig(Section):
    """Progress output and metrics. ``metrics.jsonl`` is always written."""

    logging_steps: int = Field(10, gt=0)
    progress: Literal["auto", "rich", "lines", "none"] = Field(
        "auto", description="auto: rich on a terminal, else lines"
    )
    report_to: SinkNames = Field(default_factory=list)
    wandb_project: str = "steplm"


class RunConfig(Section):
    """One run."""

    name: str = Field("run", pattern=FOLDER_NAME)
    method: MethodName = Field(
        "step",
        description="auto: the best measured (one stage, 8-bit Muon, no master weights); step: old layers are frozen "
        "under adapters; growth: all are trained; thawed: old ones by optim.old_layers; vanilla, lora, relora, badam: "
        "one stage",
    )
    seed: int = Field(0, lt=2**32, ge=0)
    output_dir: str | None = Field(None, description="default: runs/NAME")
    init_from: str | None = Field(None, description="Hugging Face folder whose weights start stage 1")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)
    growth: GrowthConfig = Field(default_factory=GrowthConfig)
    pet: PetConfig = Field(default_factory=PetConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """Use the defaults of sections that are ``None``, as YAML reads a section with all keys commented out."""
        if not isinstance(values, Mapping):
            return values
        return {**values, **{name: {} for name in sections_of(cls) if name in values and values[name] is None}}

    @model_validator(mode="before")
    @classmethod
    def _learning_rate(cls, values: Any) -> Any:
        """Replace ``optim.learning_rate: auto``."""
        if not isinstance(values, Mapping):
            return values
        model, plan, optim = (values.get(name) or {} for name in ("model", "plan", "optim"))
        if not all(isinstance(section, Mapping) for section in (model, plan, optim)):
            return values
        if optim.get("learning_rate", "auto") != "auto":
            return values
        rate = default_learning_rate(
            str(values.get("method", "step")),
            str(optim.get("name", "adamw")),
            model.get("hidden_size", ModelConfig.model_fields["hidden_size"].default),
            in_stages=plan.get("num_stages") != 1,
        )
        return {**values, "optim": {**optim, "learning_rate": rate}}

    @model_validator(mode="before")
    @classmethod
    def _one_stage(cls, values: Any) -> Any:
        """Set ``plan.num_stages`` to 1 by default for methods that do not grow."""
        plan = values.get("plan") or {} if isinstance(values, Mapping) else None
        if not isinstance(plan, Mapping) or values.get("method") not in ONE_STAGE_METHODS:
            return values
        return {**values, "plan": {"num_stages": 1, **plan}}

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        """Replace ``method: auto`` by the recipe of docs/choosing.md, keeping update rules and formats that are set."""
        if not isinstance(values, Mapping) or values.get("method") != "auto":
            return values
        plan, optim, memory, train = (values.get(name) or {} for name in ("plan", "optim", "memory", "train"))
        if not all(isinstance(section, Mapping) for section in (plan, optim, memory, train)):
            return values
        masters = {} if train.get("precision") == "fp32" else {"master_weights": False}
        return {
            **values,
            "method": "vanilla",
            "plan": {**plan, "num_stages": 1, "layers": None},
            "optim": {"name": "muon", **optim},
            "memory": {"optimizer_states": "8bit", **masters, **memory},
        }

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.plan.num_stages > self.model.num_hidden_layers:
            raise ValueError(
                f"plan.num_stages={self.plan.num_stages} is more than model.num_hidden_layers="
                f"{self.model.num_hidden_layers}: every stage adds at least one layer"
            )
        if self.plan.layers is not None and sum(self.plan.layers) != self.model.num_hidden_layers:
            raise ValueError(
                f"plan.layers {self.plan.layers} adds up to {sum(self.plan.layers)}, "
                f"but model.num_hidden_layers is {self.model.num_hidden_layers}"
            )
        for name in ("learning_rate", "warmup_ratio", "decay_ratio"):
            values = getattr(self.optim, name)
            if isinstance(values, list) and len(values) != self.plan.num_stages:
                raise ValueError(f"optim.{name} has {len(values)} entries for plan.num_stages={self.plan.num_stages}")
        self._check_batch()
        if self.train.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"train.sequence_length={self.train.sequence_length} is more than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        return self

    def _check_batch(self) -> None:
        """Check that the batch and the devices can be divided evenly."""
        train, world_size, num_shards = self.train, self.distributed.world_size, self.distributed.num_shards
        if train.global_batch_size is not None and train.gradient_accumulation_steps > 1:
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} says how many micro-batches a step has: leave "
                f"train.gradient_accumulation_steps={train.gradient_accumulation_steps} out"
            )
        if self.global_batch_size % world_size:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} sequences cannot be divided evenly among "
                f"{world_size} devices: choose a number of devices that divides it"
            )
        if world_size % num_shards:
            raise ValueError(
                f"distributed.shard_size={num_shards} does not divide the {world_size} devices: each copy of the model "
                "states needs as many"
            )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")

    @property
    def prepared_dir(self) -> Path:
        """The folder of the token shards, after ``steplm.data.prepare.with_prepared_dir`` has resolved it."""
        if self.data.prepared_dir is None:
            raise ConfigError("data.prepared_dir is not set, and not resolved yet")
        return Path(self.data.prepared_dir)

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step over all devices."""
        train = self.train
        product = train.per_device_train_batch_size * train.gradient_accumulation_steps * self.distributed.world_size
        return train.global_batch_size or product

    @property
    def eval_batch_size(self) -> int:
        """Sequences per device in one evaluation batch."""
        return self.eval.per_device_eval_batch_size or self.train.per_device_train_batch_size

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step over all devices."""
        return self.global_batch_size * self.train.sequence_length

    @property
    def micro_batches(self) -> int:
        """Forward passes per device in one optimizer step."""
        return -(-self.global_batch_size // (self.distributed.world_size * self.train.per_device_train_batch_size))

    @property
    def sums_in_fp32(self) -> bool:
        """Whether gradients are summed over micro-batches in fp32."""
        return self.train.gradient_accumulation_dtype == "fp32" and self.micro_batches > 1

    @property
    def micro_batch_size(self) -> int:
        """Sequences in the largest micro-batch of a device."""
        return min(self.train.per_device_train_batch_size, self.global_batch_size // self.distributed.world_size)

    def learning_rate(self, stage: int) -> float:
        """Highest learning rate of a stage, counted from 1."""
        return _of_stage(self.optim.learning_rate, stage)

    def warmup_ratio(self, stage: int) -> float:
        """Share of warm-up steps in a stage, counted from 1."""
        return _of_stage(self.optim.warmup_ratio, stage)

    def decay_ratio(self, stage: int) -> float:
        """Share of decay steps in a stage, counted from 1."""
        return _of_stage(self.optim.decay_ratio, stage)


def default_learning_rate(method: str, rule: str, hidden_size: Any, *, in_stages: bool) -> float:
    """What ``optim.learning_rate: auto`` stands for, with two significant digits.

    The best rates of the runs in ``results/`` are inversely proportional to the width, as for AdamW under the maximal
    update parametrization (Yang et al., arXiv 2203.03466), or under Muon to its square root, and half as high in stages
    and blocks: docs/update_rules.md.

    Args:
        hidden_size: a value that is not a positive number, which validation refuses, counts as 1.
    """
    factor, power = DEFAULT_RATES.get(rule, DEFAULT_RATES["adamw"])
    if in_stages or method == "badam":
        factor /= 2
    width = hidden_size if isinstance(hidden_size, int) and hidden_size > 0 else 1
    return float(f"{factor / width**power:.2g}")


def _of_stage(value: float | list[float], stage: int) -> float:
    return value[stage - 1] if isinstance(value, list) else value


def load_config(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file (or the name of a shipped recipe, or a mapping) and apply overrides.

    Args:
        source: path of a YAML file, a recipe's name such as ``llama_368m``, a Hugging Face model folder or its
            ``config.json`` (a run with that model and defaults for everything else), or nested mappings.
        overrides: ``section.key=value`` strings; the value is parsed as YAML.

    Raises:
        ConfigError: all problems at once, each with its path and, for unknown keys, the nearest known key.
    """
    return validated(RunConfig, read_values(source, overrides))


def read_values(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read the values as written, before defaults and checks; arguments as for ``load_config``."""
    values = dict(source) if isinstance(source, Mapping) else _read(source)
    if "entries" in values and not isinstance(source, Mapping):
        raise ConfigError(f"{source} is a suite of runs: `steplm compare {source}`", path=str(source))
    for override in overrides:
        apply_override(values, override)
    refuse_old_keys(values)
    return values


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A copy of the configuration with values changed by ``section.key``.

    Raises:
        ConfigError: the new values are invalid.
    """
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return validated(RunConfig, values)


def token_budget(**given: Any) -> dict[str, Any]:
    """Changes that set the only token budget of ``plan``, as in ``token_budget(total_tokens=10**9)``."""
    return {f"plan.{name}": given.get(name) for name in TOKEN_BUDGETS}


def load_written_config(path: Path) -> RunConfig:
    """Load a file that a run wrote (``config.yaml``, ``training_config.yaml``), possibly with an earlier version.

    Raises:
        ConfigError: the file cannot be used.
    """
    return validated(RunConfig, translate_old_keys(read_yaml(path)))


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if os.path.isfile(path / "config.json"):
        path = path / "config.json"
    return _of_hf_config(path) if path.suffix == ".json" and os.path.isfile(path) else read_yaml(find_config(source))


def _of_hf_config(path: Path) -> dict[str, Any]:
    """The values of a run with the model of a Hugging Face configuration."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        values = written.get("text_config", written)
        own = _own_keys(values)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is not a Hugging Face configuration: {error}", path=str(path)) from None
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if not own.keys() >= {"model_type", *sizes}:
        own |= _sizes_under_other_names(own.get("model_type"), values)
    if missing := {"model_type", *sizes} - own.keys():
        raise ConfigError(
            f"{path} has no {', '.join(sorted(missing))}. Write a YAML with the section `model` instead.",
            path=str(path),
        )
    # Keys that describe how the file was made. Special tokens are dropped too, as they belong to another tokenizer.
    ignored = ("architectures", "auto_map", "quantization_config", "torch_dtype", "dtype", "use_cache")
    extra = {
        key: value
        for key, value in values.items()
        if key not in ignored and not key.startswith("_") and not key.endswith("_token_id")
    }
    # The mark of a written configuration, in which keys that the family lacks are no mistakes.
    extra["transformers_version"] = values.get("transformers_version") or "unknown"
    if extra.pop("num_key_value_heads", 1) is None:
        own["num_key_value_heads"] = own["num_attention_heads"]
    length = min(TrainConfig().sequence_length, own.get("max_position_embeddings", 2048))
    own.setdefault("tie_word_embeddings", None)  # transformers leaves out what is the default
    return {"name": path.parent.name or "run", "model": {**own, "extra": extra}, "train": {"sequence_length": length}}


def _own_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the keys of ``ModelConfig`` from ``values``, and return them."""
    return {key: values.pop(key) for key in ModelConfig.model_fields if values.get(key) is not None}


def _sizes_under_other_names(model_type: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The same for a family with names of its own, such as ``n_embd`` for ``hidden_size`` in GPT-2."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    family = CONFIG_MAPPING[model_type]
    for name, alias in family.attribute_map.items():
        if alias in values:
            values[name] = values.pop(alias)
    has_default = getattr(family(), "intermediate_size", None) is None  # a multiple of hidden_size
    return {"intermediate_size": None} | _own_keys(values) if has_default else _own_keys(values)


def dump_config(config: RunConfig) -> str:
    """YAML text from which ``load_config`` reads an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def find_config(source: str | Path) -> Path:
    """The path of a YAML file, or of the shipped recipe with that name."""
    path = Path(source)
    if os.path.isfile(path):
        return path
    recipes = recipes_dir()
    if len(path.parts) == 1 and os.path.isfile(recipes / f"{path.name}.yaml"):
        return recipes / f"{path.name}.yaml"
    if len(path.parts) == 1 and os.path.isfile(recipes / "suites" / f"{path.stem}.yaml"):
        raise ConfigError(f"{path.stem} is a suite of runs: `steplm compare {path.stem}`", path=str(path))
    if os.path.isdir(path):
        raise ConfigError(f"the folder {shortened(str(path), 300)} has no config.json.", path=str(path))
    names = sorted(recipe.stem for recipe in recipes.glob("*.yaml"))
    hint = nearest(path.stem, names, otherwise=f" Recipes: {', '.join(names)}.")
    hint = hint.replace("Did you mean", "Did you mean the recipe")
    raise ConfigError(f"no file {shortened(str(path), 300)}.{hint}", path=str(path))


def recipes_dir() -> Path:
    """The folder of the shipped recipes: inside the installed package, or next to it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def config_keys() -> list[str]:
    """Every configuration key, as ``section.key``."""
    return keys_of(RunConfig)


def config_schema() -> dict[str, Any]:
    """The JSON schema of ``run.yaml``, for editors."""
    schema = RunConfig.model_json_schema()
    for name, entry in schema["properties"].items():
        if "$ref" in entry:  # a section, which may be empty in YAML
            schema["properties"][name] = {"anyOf": [entry, {"type": "null"}]}
    return schema
