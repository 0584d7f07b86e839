"""Wrappers that turn update rules into PyTorch optimizers, and PyTorch optimizers into update rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steplm.errors import CheckpointMismatch, ConfigError
from steplm.optim.base import NamedParameters, RuleBase


class RuleOptimizer(torch.optim.Optimizer):
    """Update rules as one ``torch.optim.Optimizer``, for your own training loop or Hugging Face's ``Trainer``.

        hidden = Muon(matrices_of_layers)
        rest = AdamW(all_else)
        optimizer = RuleOptimizer([hidden, rest], lr=1e-3)

    Each rule is a parameter group, and learning-rate schedulers can change its ``lr``. Other options of a rule, such as
    its weight decay, are set when it is created. ``state_dict`` returns the rules' own states, not copies.

    Args:
        rules: rules that share no parameters with each other.
        lr: learning rate of all groups.
    """

    def __init__(self, rules: Sequence[RuleBase], lr: float) -> None:
        self.rules = list(rules)
        super().__init__([{"params": list(rule.parameters.values())} for rule in self.rules], {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the loss of ``closure``, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, group in zip(self.rules, self.param_groups, strict=True):
            rule.step(float(group["lr"]))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """``param_groups`` as in PyTorch; ``state`` has the tensors and steps of each rule, by its index."""
        saved = super().state_dict()
        saved["state"] = dict(enumerate(rule.state_dict() for rule in self.rules))
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy the result of ``state_dict`` into the rules.

        Raises:
            ValueError: from PyTorch, if the groups differ.
            CheckpointMismatch: if the rules' parameters or formats differ.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for index, rule in enumerate(self.rules):
            rule.load_state_dict(*state_dict["state"][index])


class TorchRule(RuleBase):
    """Any ``torch.optim.Optimizer`` as an update rule, with one optimizer per parameter.

        TorchRule(named_parameters, lambda parameters: torch.optim.NAdam(parameters, weight_decay=0.1))

    Each step sets the learning rate. The optimizer creates its own states, usually at a parameter's first step, so no
    plan includes their bytes. They have the parameter's precision, without master weights.

    Args:
        named_parameters: the parameters that the rule updates, by name.
        make: creates the optimizer for a list of one parameter.
    """

    def __init__(
        self, named_parameters: NamedParameters, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        super().__init__(weight_decay=0.0)  # the optimizer has its own
        self._make = make
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._options: dict[str, dict[str, Any]] = {}
        self.set_parameters(named_parameters)

    def set_parameters(self, named_parameters: NamedParameters) -> None:
        super().set_parameters(named_parameters)
        for name in self.optimizers.keys() - self.parameters.keys():
            del self.optimizers[name], self._options[name]

    def _new_states(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        self.optimizers[name] = self._make([parameter])
        self._options[name] = _options(self.optimizers[name])
        return {}  # the optimizer creates them

    def _update(self, names: list[str], learning_rate: float, grad_scale: float) -> None:
        for name in names:
            parameter, optimizer = self.parameters[name], self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            gradient = parameter.grad
            if gradient is not None and grad_scale != 1.0:
                parameter.grad = gradient * grad_scale
            optimizer.step()
            parameter.grad = gradient

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's states that are tensors, by parameter name and state name."""
        return {
            name: {key: value for key, value in self._state(name).items() if isinstance(value, Tensor)}
            for name in self.parameters
        }

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Like ``RuleBase.state_dict``.

        Raises:
            ConfigError: the optimizer has state that is not a tensor or is in its groups, and so could not resume.
        """
        for name, optimizer in self.optimizers.items():
            kept = [k for k, value in self._state(name).items() if not (value is None or isinstance(value, Tensor))]
            kept += [key for key, value in _options(optimizer).items() if value != self._options[name].get(key)]
            if kept:
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps {', '.join(kept)} as numbers, and a checkpoint holds tensors. "
                    "Take an optimizer whose whole state is tensors, as those of torch.optim.",
                    kept=kept,
                )
        return super().state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int], *, strict: bool = True) -> None:
        """Like ``RuleBase.load_state_dict``, but compares only names: the optimizer creates its states later.

        Raises:
            CheckpointMismatch: the saved parameters are different ones (if ``strict``).
        """
        differing = sorted(set(steps) ^ set(self.steps)) if strict else []
        if differing:
            raise CheckpointMismatch(
                f"the saved optimizer state is of other parameters: {', '.join(differing)}.", differing=differing
            )
        for key, tensor in tensors.items():
            name, _, state = key.rpartition(".")
            if name in self.parameters:
                self._state(name)[state] = tensor.clone()
        self.steps.update({name: count for name, count in steps.items() if name in self.steps})

    def _state(self, name: str) -> dict[str, Any]:
        return self.optimizers[name].state[self.parameters[name]]


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The options in the optimizer's only group, without its parameter and the learning rate."""
    return {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "lr")}
