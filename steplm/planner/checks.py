"""What options require of a run, checked in one place when the plan is made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from steplm.config import RunConfig
from steplm.cost.rules import ADAMW, RULES, masters_of
from steplm.errors import ConfigError
from steplm.planner.methods import METHODS, Draft, value_and_default
from steplm.schedule import Adapter, Trained
from steplm.units import as_yaml


@dataclass(frozen=True)
class Run:
    """A configuration, and every kind of phase of its method."""

    config: RunConfig
    drafts: Sequence[Draft]

    @property
    def thaws_layers(self) -> bool:
        """Whether a layer that was frozen is trained again."""
        return any(draft.entry.kind == "go_on" for draft in self.drafts)

    @property
    def has_adapters(self) -> bool:
        return any(isinstance(role, Adapter) for draft in self.drafts for role in draft.layers)

    @property
    def rules(self) -> set[str]:
        """The update rules of everything that is trained."""
        roles = {role for draft in self.drafts for role in (*draft.layers, draft.embeddings_and_head)}
        return {ADAMW, *(role.rule for role in roles if isinstance(role, Trained | Adapter))}


@dataclass(frozen=True)
class Need:
    """A requirement of an option: ``is_met`` must hold if the option has one of ``values`` (None: not its default)."""

    option: str
    is_met: Callable[[Run], bool]
    message: str  # follows the option's name; after a colon: what to change
    values: Collection[Any] | None = None


FROZEN_ONLY = "is for frozen layers, and {config.method} freezes none"
THAWED = "keeps layers frozen for good, and {config.method} trains them again"
WHOLE = "keeps whole matrices, and distributed.shard_size={config.distributed.num_shards} divides them"
NOT_COMPILED = "fetches weights while a layer runs, which a compiled layer cannot: set train.compile=false"
DELAYED = "updates weights during the passes of the next step, which need the old ones: set "
FROZEN_OPTIONS = (("memory.frozen_weights", None), ("memory.offload_frozen", None))

NEEDS = (
    Need(
        "memory.fused_backward",
        lambda run: run.config.micro_batches == 1 or run.config.memory.offload_optimizer,
        "keeps no gradients that micro-batches could be added to, and a step has {config.micro_batches}: set "
        "train.gradient_accumulation_steps=1, or memory.offload_optimizer=true, which sums them in host memory",
    ),
    Need(
        "optim.skip_sigma_factor",
        lambda run: not run.config.memory.fused_backward,
        "compares the norm of all gradients before an update, and memory.fused_backward updates before all are there: "
        "leave memory.fused_backward out",
    ),
    Need(
        "memory.offload_optimizer",
        lambda run: run.config.distributed.world_size == 1,
        "updates whole parameters, and FSDP2 shards them over {config.distributed.world_size} devices",
    ),
    Need(
        "memory.offload_weights",
        lambda run: run.config.memory.offload_optimizer,
        "fetches weights that are updated in host memory: set memory.offload_optimizer=true",
    ),
    Need(
        "memory.offload_weights",
        lambda run: not run.thaws_layers,
        "keeps the same layers in host memory for a whole stage, and {config.method} changes which layers are trained",
    ),
    Need(
        "memory.delay_update",
        lambda run: run.config.memory.offload_optimizer,
        "is for updates on the CPU: set memory.offload_optimizer=true",
    ),
    Need(
        "memory.delay_update",
        lambda run: not run.config.memory.fused_backward,
        DELAYED + "memory.fused_backward=false",
    ),
    Need(
        "memory.delay_update",
        lambda run: not run.config.memory.offload_weights,
        DELAYED + "memory.offload_weights=false",
    ),
    Need(
        "train.gradient_accumulation_dtype",
        lambda run: (
            1 in (run.config.distributed.world_size, run.config.micro_batches) or run.config.train.precision == "fp32"
        ),
        "needs whole parameters, and FSDP2 shards them over {config.distributed.world_size} devices",
    ),
    Need(
        "memory.master_weights",
        lambda run: run.config.train.precision == "bf16",
        "is about the fp32 copy of bf16 weights, and train.precision=fp32 has none",
        (False, "8bit"),
    ),
    Need(
        "memory.master_weights",
        lambda run: run.rules > {run.config.memory.master_weights},
        "names one update rule of several, and {config.optim.name} is the only one: set it to true or false",
        RULES,
    ),
    *(
        Need(option, lambda run: not run.config.train.compile, NOT_COMPILED)
        for option in ("memory.offload_frozen", "memory.offload_weights")
    ),
    *(
        Need(option, lambda run: METHODS[run.config.method].freezes, FROZEN_ONLY, values)
        for option, values in (*FROZEN_OPTIONS, ("train.gradient_checkpointing", ["frozen"]))
    ),
    *(
        Need(option, lambda run: not run.thaws_layers, THAWED, values)
        for option, values in (*FROZEN_OPTIONS, ("train.gradient_checkpointing", ["frozen", "new"]))
    ),
    Need(
        "plan.train_embeddings",
        lambda run: run.config.pet.method != "none",
        "needs adapters: leave pet.method=none out",
        ["adapters"],
    ),
    Need("pet.restarts", lambda run: run.has_adapters, "restarts adapters, and this run has none"),
    Need(
        "pet.restart_keep",
        lambda run: run.config.pet.rule == ADAMW,
        "keeps Adam's moments, and pet.rule={config.pet.rule} has none: set pet.rule=adamw",
    ),
    *(
        Need(option, lambda run: run.config.distributed.num_shards == 1, WHOLE)
        for option in ("memory.frozen_weights", "memory.offload_frozen", "pet.restart_keep")
    ),
)


def check_options(run: Run) -> None:
    """Check that the run meets the requirements of every option.

    Raises:
        ConfigError: for the first requirement that is not met, with what to change.
    """
    for problem in _problems(run):
        raise ConfigError(problem)


def _problems(run: Run) -> Iterator[str]:
    config = run.config
    for need in NEEDS:
        value, default = value_and_default(config, need.option)
        is_set = value != default if need.values is None else value in need.values
        if is_set and not need.is_met(run):
            told = "" if value is True else f"={as_yaml(value)}"
            link = ", or" if ": " in need.message else ":"
            yield f"{need.option}{told} {need.message.format(config=config)}{link} leave {need.option} out."
    for rule in sorted(run.rules):
        row, memory = RULES[rule], config.memory
        if memory.optimizer_states not in row.states:
            formats = " or ".join(row.states)
            yield (f"update rule {rule} has its states in {formats}: memory.optimizer_states={memory.optimizer_states} "
                   "is not for it.")  # fmt: skip
        if masters_of(rule, memory) not in row.masters and config.train.precision == "bf16":
            yield (f"update rule {rule} cannot keep memory.master_weights={memory.master_weights}: set it to true or "
                   "false.")  # fmt: skip
        if config.distributed.num_shards > 1 and not row.shardable:
            yield (f"update rule {rule} works on whole matrices, and "
                   f"distributed.shard_size={config.distributed.num_shards} divides them: set "
                   "distributed.shard_size=1, or optim.name=adamw.")  # fmt: skip
        if config.distributed.num_shards > 1 and memory.fused_backward and row.sent_bytes:
            yield (f"update rule {rule} gathers matrices over the devices, one at a time with memory.fused_backward: "
                   "set distributed.shard_size=1, or leave memory.fused_backward out.")  # fmt: skip
    if config.distributed.num_shards > 1 and run.thaws_layers:
        yield (f"method={config.method} changes which layers are trained, which FSDP2 does not allow: set "
               "distributed.shard_size=1.")  # fmt: skip
