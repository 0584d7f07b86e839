"""AdamW with fp32 master weights: 12 bytes of state per bf16 parameter, 8 per fp32 parameter, to the byte."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from steplm.errors import CheckpointMismatch


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return parameter.ndim >= 2


class MasterAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose arithmetic is fp32, keyed by parameter name.

    A bf16 parameter has an fp32 master weight: the master is updated, and the parameter is the master
    rounded. An fp32 parameter is its own master. All states exist from construction, and each parameter
    counts its own steps, so that one that is new begins its bias correction at 0 while others go on.

    Args:
        named_parameters: the trained parameters by name; others may not be among them.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate; see ``decays``.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.parameters: dict[str, nn.Parameter] = dict(named_parameters)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps: dict[str, int] = dict.fromkeys(self.parameters, 0)
        self._states: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            weight = parameter.detach()
            states = {key: torch.zeros_like(weight, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
            if weight.dtype != torch.float32:
                states["master"] = weight.float()
            self._states[name] = states
        self._buckets = _buckets(self.parameters)

    @torch.no_grad()
    def step(self, learning_rate: float, grad_scale: float = 1.0) -> None:
        """One update of every parameter that has a gradient.

        ``grad_scale`` multiplies the gradients in fp32 and leaves ``.grad`` as it is. Beside the states
        this allocates no more than one fp32 gradient of the largest parameter.
        """
        for bucket in self._buckets:
            names = [name for name in bucket if self.parameters[name].grad is not None]
            if not names:
                continue
            weights = [self.parameters[name].detach() for name in names]
            states = [self._states[name] for name in names]
            masters = [state.get("master", weight) for state, weight in zip(states, weights, strict=True)]
            gradients = [self._gradient(name, grad_scale) for name in names]
            adamw(
                masters,
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                # The kernel wants a tensor, and adds 1 to it before it uses it.
                [torch.full((), float(self.steps[name]), device=weights[0].device) for name in names],
                foreach=False,
                capturable=False,
                differentiable=False,
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=learning_rate,
                weight_decay=self.weight_decay if decays(names[0], weights[0]) else 0.0,
                eps=self.eps,
                maximize=False,
            )
            for name, weight, master in zip(names, weights, masters, strict=True):
                self.steps[name] += 1
                if master is not weight:
                    weight.copy_(master)

    def zero_grad(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The states themselves, by parameter name: ``exp_avg``, ``exp_avg_sq`` and, for bf16, ``master``."""
        return {name: dict(states) for name, states in self._states.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The states themselves under ``NAME.KEY``, as safetensors wants them. ``steps`` is apart."""
        return {
            f"{name}.{key}": tensor for name, states in self._states.items() for key, tensor in states.items()
        }

    def load_state_dict(
        self, tensors: Mapping[str, Tensor], steps: Mapping[str, int], *, strict: bool = True
    ) -> None:
        """Copy saved states in, exactly.

        Args:
            tensors: what ``state_dict`` gave.
            steps: what ``steps`` was.
            strict: every state of this optimizer must be given. If not, parameters of which nothing is
                given stay as they are (new ones, after a growth).

        Raises:
            CheckpointMismatch: missing or unknown names, other shapes or dtypes, half a parameter's states.
        """
        own = self.state_dict()
        present = {
            name for name, states in self._states.items() if any(f"{name}.{key}" in tensors for key in states)
        }
        expected = [
            f"{name}.{key}"
            for name, states in self._states.items()
            for key in states
            if strict or name in present
        ]
        missing = [name for name in expected if name not in tensors]
        missing += [
            f"{name} (steps)" for name in self._states if (strict or name in present) and name not in steps
        ]
        unknown = [name for name in tensors if name not in own]
        unknown += [f"{name} (steps)" for name in steps if name not in self._states]
        wrong = [name for name in expected if name in tensors and not _alike(own[name], tensors[name])]
        if missing or unknown or wrong:
            parts = (("missing", missing), ("unknown", unknown), ("of another shape or dtype", wrong))
            told = "; ".join(
                f"{len(names)} {what} ({', '.join(names[:3])}{' …' * (len(names) > 3)})"
                for what, names in parts
                if names
            )
            raise CheckpointMismatch(
                f"the saved optimizer state is not that of the trained parameters: {told}. "
                "The checkpoint was made with another plan or another precision.",
                missing=missing,
                unknown=unknown,
                wrong=wrong,
            )
        for name in expected:
            own[name].copy_(tensors[name])
        self.steps.update(steps)

    def _gradient(self, name: str, scale: float) -> Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None
        if gradient.dtype != torch.float32:
            gradient = gradient.float()
            return gradient if scale == 1.0 else gradient.mul_(scale)
        return gradient if scale == 1.0 else gradient * scale


def carry_state(
    tensors: Mapping[str, Tensor],
    steps: Mapping[str, int],
    renamed: Mapping[str, str],
    trained_names: Collection[str],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What of an optimizer's state a growth keeps: that of parameters that go on being trained.

    Args:
        tensors: flat states of the old optimizer.
        steps: its steps.
        renamed: old name -> new name of every weight that outlives the growth. Adapters do not: they are
            merged, and those after the growth are fresh, though they bear the same names.
        trained_names: parameters trained after the growth.

    Returns:
        Tensors (not copied) and steps under the new names, for ``load_state_dict(…, strict=False)``.
    """
    kept = {name: renamed[name] for name in steps if renamed.get(name) in trained_names}
    flat = {}
    for key, tensor in tensors.items():
        name, _, state = key.rpartition(".")
        if name in kept:
            flat[f"{kept[name]}.{state}"] = tensor
    return flat, {new: steps[name] for name, new in kept.items()}


@torch.no_grad()
def global_grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm over all gradients, an fp32 scalar; bf16 gradients are summed in fp32."""
    norms = [
        torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        for parameter in parameters
        if parameter.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip_coefficient(norm: Tensor | float, max_norm: float | None) -> float:
    """The factor, at most 1, that brings a gradient of this norm down to ``max_norm`` (``None``: no clipping)."""
    if max_norm is None:
        return 1.0
    value = float(norm)
    return value if math.isnan(value) else min(1.0, max_norm / (value + 1e-6))


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype


def _buckets(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names in groups for one kernel call each: of one device and one weight decay, and together no larger
    than the largest parameter, so that their fp32 gradients need no more memory than its does."""
    limit = max((parameter.numel() for parameter in parameters.values()), default=0)
    buckets: list[list[str]] = []
    open_buckets: dict[tuple[torch.device, bool], tuple[list[str], int]] = {}
    for name, parameter in parameters.items():
        kind = (parameter.device, decays(name, parameter))
        names, size = open_buckets.get(kind, ([], limit))
        if size + parameter.numel() > limit:
            names, size = [], 0
            buckets.append(names)
        names.append(name)
        open_buckets[kind] = (names, size + parameter.numel())
    return buckets
