"""What options require of a run, checked in one place when the plan is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from steplm.config import RunConfig
from steplm.cost.rules import ADAMW, RULES, masters_of
from steplm.errors import ConfigError
from steplm.planner.methods import METHODS, Draft
from steplm.schedule import Adapter, Trained


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
    """A requirement of an option: if ``is_set``, then ``is_met`` must hold."""

    option: str
    is_set: Callable[[RunConfig], bool]
    is_met: Callable[[Run], bool]
    message: str  # follows the option's name; after a colon: what to change


FROZEN_ONLY = "is for frozen layers, and {config.method} freezes none"
THAWED = "keeps layers frozen for good, and {config.method} trains them again"
WHOLE = "keeps whole matrices, and distributed.shard_size={config.distributed.num_shards} divides them"

NEEDS = (
    Need(
        "memory.fused_backward",
        lambda config: config.memory.fused_backward,
        lambda run: run.config.micro_batches == 1 or run.config.memory.offload_optimizer,
        "keeps no gradients that micro-batches could be added to, and a step has {config.micro_batches}: set "
        "train.gradient_accumulation_steps=1, or memory.offload_optimizer=true, which sums them in host memory",
    ),
    Need(
        "optim.skip_sigma_factor",
        lambda config: config.optim.skip_sigma_factor is not None,
        lambda run: not run.config.memory.fused_backward,
        "compares the norm of all gradients before an update, and memory.fused_backward updates before all are there: "
        "leave memory.fused_backward out",
    ),
    Need(
        "memory.offload_optimizer",
        lambda config: config.memory.offload_optimizer,
        lambda run: run.config.distributed.world_size == 1,
        "updates whole parameters, and FSDP2 shards them over {config.distributed.world_size} devices",
    ),
    Need(
        "memory.offload_weights",
        lambda config: config.memory.offload_weights,
        lambda run: run.config.memory.offload_optimizer,
        "fetches weights that are updated in host memory: set memory.offload_optimizer=true",
    ),
    Need(
        "memory.offload_weights",
        lambda config: config.memory.offload_weights,
        lambda run: not run.thaws_layers,
        "keeps the same layers in host memory for a whole stage, and {config.method} changes which layers are trained",
    ),
    Need(
        "memory.delay_update",
        lambda config: config.memory.delay_update,
        lambda run: run.config.memory.offload_optimizer,
        "is for updates on the CPU: set memory.offload_optimizer=true",
    ),
    *(
        Need(
            "memory.delay_update",
            lambda config: config.memory.delay_update,
            is_unset,
            f"updates weights during the passes of the next step, which need the old ones: set {option}=false",
        )
        for option, is_unset in (
            ("memory.fused_backward", lambda run: not run.config.memory.fused_backward),
            ("memory.offload_weights", lambda run: not run.config.memory.offload_weights),
        )
    ),
    Need(
        "train.gradient_accumulation_dtype",
        lambda config: config.sums_in_fp32 and config.train.precision == "bf16",
        lambda run: run.config.distributed.world_size == 1,
        "needs whole parameters, and FSDP2 shards them over {config.distributed.world_size} devices",
    ),
    Need(
        "memory.master_weights",
        lambda config: config.memory.master_weights in (False, "8bit"),
        lambda run: run.config.train.precision == "bf16",
        "is about the fp32 copy of bf16 weights, and train.precision=fp32 has none",
    ),
    Need(
        "memory.master_weights",
        lambda config: config.memory.master_weights in RULES,
        lambda run: run.rules > {run.config.memory.master_weights},
        "names one update rule of several, and {config.optim.name} is the only one: set it to true or false",
    ),
    *(
        Need(
            option,
            is_set,
            lambda run: not run.config.train.compile,
            "fetches weights while a layer runs, which a compiled layer cannot: set train.compile=false",
        )
        for option, is_set in (
            ("memory.offload_frozen", lambda config: config.memory.offload_frozen),
            ("memory.offload_weights", lambda config: config.memory.offload_weights),
        )
    ),
    *(
        Need(option, is_set, lambda run: METHODS[run.config.method].freezes, FROZEN_ONLY)
        for option, is_set in (
            ("memory.frozen_weights", lambda config: config.memory.frozen_weights != "full"),
            ("memory.offload_frozen", lambda config: config.memory.offload_frozen),
            ("train.gradient_checkpointing", lambda config: config.train.gradient_checkpointing == "frozen"),
        )
    ),
    *(
        Need(option, is_set, lambda run: not run.thaws_layers, THAWED)
        for option, is_set in (
            ("memory.frozen_weights", lambda config: config.memory.frozen_weights != "full"),
            ("memory.offload_frozen", lambda config: config.memory.offload_frozen),
            ("train.gradient_checkpointing", lambda config: config.train.gradient_checkpointing in ("frozen", "new")),
        )
    ),
    Need(
        "plan.train_embeddings",
        lambda config: config.plan.train_embeddings == "adapters",
        lambda run: run.config.pet.method != "none",
        "needs adapters: leave pet.method=none out",
    ),
    Need(
        "pet.restarts",
        lambda config: config.pet.restarts > 0,
        lambda run: run.has_adapters,
        "restarts adapters, and this run has none",
    ),
    Need(
        "pet.restart_keep",
        lambda config: config.pet.restart_keep > 0,
        lambda run: run.config.pet.rule == ADAMW,
        "keeps Adam's moments, and pet.rule={config.pet.rule} has none: set pet.rule=adamw",
    ),
    *(
        Need(option, is_set, lambda run: run.config.distributed.num_shards == 1, WHOLE)
        for option, is_set in (
            ("memory.frozen_weights", lambda config: config.memory.frozen_weights != "full"),
            ("memory.offload_frozen", lambda config: config.memory.offload_frozen),
            ("pet.restart_keep", lambda config: config.pet.restart_keep > 0),
        )
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
        if need.is_set(config) and not need.is_met(run):
            section, _, key = need.option.partition(".")
            value = getattr(getattr(config, section), key)
            told = "" if value is True else f"={_as_yaml(value)}"
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
        if memory.fused_backward and not row.fused_backward:
            yield f"update rule {rule} does not go with memory.fused_backward: leave one of them out."
    if config.distributed.num_shards > 1 and run.thaws_layers:
        yield (f"method={config.method} changes which layers are trained, which FSDP2 does not allow: set "
               "distributed.shard_size=1.")  # fmt: skip


def _as_yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
