"""The update rules of a phase, each over its own parameters.

To add a rule, write its class, add it to ``MAKERS`` here, and add its bytes to ``RULES`` in ``steplm.cost.rules``,
which does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steplm.config import RunConfig
from steplm.cost.formats import NO_BLOCKS
from steplm.cost.measure import ADAPTER_TENSORS
from steplm.cost.rules import ADAMW, RULES, masters_of, row_blocks
from steplm.errors import ConfigError
from steplm.optim.adamw import AdamW
from steplm.optim.base import CodeBooks, GradNorm, RuleBase, global_grad_norm
from steplm.optim.host import FetchesWeight, HostParameters
from steplm.optim.low_rank import LowRankAdamW
from steplm.optim.muon import Muon
from steplm.optim.quantized import rounding_bits_from
from steplm.optim.scale import SCALE
from steplm.planner.shape import FAMILIES, shape_from_hf_config
from steplm.schedule import Frozen, Phase

UPDATED = ".updated"  # ends the name of a state: see ``UpdateRules.state_dict``
MASTER_WEIGHTS: dict[str, bool | str] = {"fp32": True, "8bit": "8bit", "none": False}

Make = Callable[..., RuleBase]


def _adamw(config: RunConfig, rule: str, **options: Any) -> RuleBase:
    return AdamW({}, states=config.memory.optimizer_states, **_adam(config), **options)


def _muon(config: RunConfig, rule: str, **options: Any) -> RuleBase:
    values = config.model.hf_config()
    family = FAMILIES.get(values["model_type"])
    blocks = row_blocks(shape_from_hf_config(values)) if family is not None and family.fused else NO_BLOCKS
    return Muon({}, states=config.memory.optimizer_states, row_blocks=blocks, **options)


def _scale(config: RunConfig, rule: str, **options: Any) -> RuleBase:
    return SCALE({}, **options)


def _low_rank(config: RunConfig, rule: str, *, books: CodeBooks, **options: Any) -> RuleBase:  # has no 8-bit moments
    return LowRankAdamW(
        {},
        method=rule,
        rank=config.optim.rank,
        update_proj_gap=config.optim.update_proj_gap,
        scale=config.optim.scale,
        seed=config.seed,
        **_adam(config),
        **options,
    )


def _adam(config: RunConfig) -> dict[str, Any]:
    return {"betas": (config.optim.adam_beta1, config.optim.adam_beta2), "eps": config.optim.adam_epsilon}


# Each builds a rule without parameters from a config, the rule's name and the options that all rules have.
MAKERS: dict[str, Make] = {
    ADAMW: _adamw,
    "muon": _muon,
    "scale": _scale,
    "galore": _low_rank,
    "apollo": _low_rank,
    "apollo_mini": _low_rank,
}


class UpdateRules:
    """Several rules behind the interface of a single ``RuleBase``, over all of their parameters.

    Args:
        host: holds the parameters' copies in host memory, if the optimizer is offloaded; ``parameters`` are then those.
        delays: whether updates are made during the next pass; needs ``host``.
    """

    def __init__(
        self,
        rules: Mapping[str, RuleBase],
        parameters: Mapping[str, nn.Parameter],
        host: HostParameters | None = None,
        *,
        delays: bool = False,
    ) -> None:
        self.rules, self.host, self.delays = dict(rules), host, delays
        self.parameters = dict(parameters)  # in the model's order

    @property
    def steps(self) -> dict[str, int]:
        """Number of updates since the states were created, by parameter name."""
        counts = {name: count for rule in self.rules.values() for name, count in rule.steps.items()}
        return {name: counts[name] for name in self.parameters}

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients, after waiting for those in transfer; see ``global_grad_norm``."""
        if self.host is not None:
            self.host.wait()
            self.host.wait_for_updates()  # of parameters that this pass did not reach
        return global_grad_norm(self.parameters.values())

    def step(self, learning_rate: float, grad_scale: float = 1.0) -> None:
        """Update every parameter that has a gradient; ``grad_scale`` multiplies the gradients.

        With ``delays``, the device gets the weights of the previous update now, and those of this one at the next.
        """
        if self.host is not None:
            self.host.wait()
            if self.delays:
                self.host.finish_updates()
                self.host.update_later(self._delayed_update(learning_rate, grad_scale))
                return
        for rule in self.rules.values():
            rule.step(learning_rate, grad_scale)
            if self.host is not None:
                self.host.send(name for name, parameter in rule.parameters.items() if parameter.grad is not None)

    @contextmanager
    def in_backward(self, learning_rate: float | None, grad_scale: float = 1.0) -> Iterator[GradNorm]:
        """See ``RuleBase.in_backward``. With ``host``, gradients of earlier backward passes are part of the update."""
        norm, owners = GradNorm(self.parameters.values()), self._owners()

        def update_on_host(name: str) -> None:
            assert self.host is not None
            owners[name].update_in_backward(name, learning_rate, grad_scale, norm)
            self.host.send([name])

        with ExitStack() as stack:
            if self.host is not None:
                stack.enter_context(self.host.calling(update_on_host))
            else:
                for rule in self.rules.values():
                    stack.enter_context(rule.in_backward(learning_rate, grad_scale, norm))
            yield norm

    def _delayed_update(self, learning_rate: float, grad_scale: float) -> Callable[[str], None]:
        owners, generator = self._owners(), torch.Generator().manual_seed(torch.initial_seed())

        def update(name: str) -> None:
            with rounding_bits_from(generator):
                owners[name].step(learning_rate, grad_scale, among=[name])
            self.parameters[name].grad = None

        return update

    def _owners(self) -> dict[str, RuleBase]:
        return {name: rule for rule in self.rules.values() for name in rule.parameters}

    def finish_updates(self) -> None:
        """Make the device use the weights of a delayed update."""
        if self.host is not None:
            self.host.finish_updates()

    def zero_grad(self) -> None:
        """Free every gradient."""
        if self.host is not None:
            self.host.zero_grad()
            return
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The states themselves, not copies, by parameter name and state name."""
        return {name: states for rule in self.rules.values() for name, states in rule.state_tensors().items()}

    def tables(self) -> list[Tensor]:
        """Lookup tables of 8-bit states, which all rules share."""
        return list({id(table): table for rule in self.rules.values() for table in rule.tables()}.values())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The states under flat names ``PARAMETER.STATE``, and the steps by parameter name.

        A weight that a delayed update changed and the device does not use yet is a state, too: ``PARAMETER.updated``.
        """
        unsent = {} if self.host is None else self.host.unsent()
        flat = {f"{name}{UPDATED}": weight for name, weight in unsent.items()}
        flat |= {key: tensor for rule in self.rules.values() for key, tensor in rule.state_dict()[0].items()}
        return flat, self.steps

    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int], *, strict: bool = True) -> None:
        """Copy saved states in; see ``RuleBase.load_state_dict``."""
        unsent = {key.removesuffix(UPDATED): tensor for key, tensor in tensors.items() if key.endswith(UPDATED)}
        if unsent and self.host is not None:
            self.host.load_unsent(unsent)
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(UPDATED)}
        owners = self._owners()
        first = next(iter(self.rules.values()))  # reports the entries that belong to no rule
        for rule in self.rules.values():
            rule.load_state_dict(
                {key: tensor for key, tensor in tensors.items() if owners.get(key.rpartition(".")[0], first) is rule},
                {name: count for name, count in steps.items() if owners.get(name, first) is rule},
                strict=strict,
            )


def build_rules(
    config: RunConfig,
    model: nn.Module,
    phase: Phase,
    layer_prefix: str,
    linears: Mapping[str, FetchesWeight] | None = None,
) -> UpdateRules:
    """Build the rules of a phase over the trained parameters of ``model``, with states allocated.

    Args:
        linears: see ``HostParameters``.
    """
    books: CodeBooks = {}
    names = {ADAMW, *(role.rule for role in phase.layers if not isinstance(role, Frozen))}
    rules = {
        name: MAKERS[name](
            config,
            name,
            weight_decay=config.optim.weight_decay,
            master_weights=MASTER_WEIGHTS[masters_of(name, config.memory)],
            books=books,
        )
        for name in sorted(names, key=lambda name: name != ADAMW)
    }
    host = None
    if config.memory.offload_optimizer:
        device = next(model.parameters()).device
        host = HostParameters(device, sums=config.micro_batches > 1, linears=linears)
        for rule in rules.values():
            rule.compute_device = device
    made = UpdateRules(rules, {}, host, delays=config.memory.delay_update)
    reassign(made, config, model, phase, layer_prefix)
    return made


def reassign(rules: UpdateRules, config: RunConfig, model: nn.Module, phase: Phase, layer_prefix: str) -> None:
    """Continue with the parameters that the phase trains; those trained before keep their states.

    Raises:
        ConfigError: the phase uses a rule that the previous phase did not use.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if rules.host is not None:
        rules.host.set_parameters(trained)
        trained = rules.host.parameters
    rules.parameters = dict(trained)
    shapes = {name: tuple(parameter.shape) for name, parameter in rules.parameters.items()}
    assigned = rule_of_each(shapes, phase, layer_prefix, linear_names(model, layer_prefix), config)
    if missing := set(assigned.values()) - rules.rules.keys():
        raise ConfigError(f"update rule {missing.pop()} begins within a stage: its phase must grow or merge.")
    for name, rule in rules.rules.items():
        rule.set_parameters({key: p for key, p in rules.parameters.items() if assigned[key] == name})


def rule_of_each(
    shapes: Mapping[str, tuple[int, ...]], phase: Phase, layer_prefix: str, linears: Collection[str], config: RunConfig
) -> dict[str, str]:
    """The rule that updates each parameter.

    Args:
        shapes: shapes of the trained parameters, by full name.
        linears: names of the linear modules relative to their layer, such as ``self_attn.q_proj``.
    """

    def rule_of(name: str, shape: tuple[int, ...]) -> str:
        if not name.startswith(f"{layer_prefix}."):
            return ADAMW
        layer, _, below = name.removeprefix(f"{layer_prefix}.").partition(".")
        role = phase.layers[int(layer)]
        is_factor = name.rpartition(".")[2] in ADAPTER_TENSORS
        is_matrix = is_factor or below.removesuffix(".weight") in linears or len(shape) == 3
        if not isinstance(role, Frozen) and is_matrix and RULES[role.rule].takes(shape, config.optim):
            return role.rule
        return ADAMW

    return {name: rule_of(name, shape) for name, shape in shapes.items()}


def linear_names(model: nn.Module, layer_prefix: str) -> frozenset[str]:
    """Names of the linear modules of all layers, relative to their layer."""
    modules = model.get_submodule(layer_prefix).named_modules()
    return frozenset(name.partition(".")[2] for name, module in modules if isinstance(module, nn.Linear))
