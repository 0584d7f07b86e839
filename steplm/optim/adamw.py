"""AdamW with fp32 master weights: 12 bytes of state per bf16 parameter, 8 per fp32 parameter, to the byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

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
            # A call of its own, so that this bucket's gradients are gone before the next one's are made.
            self._step_bucket(
                [name for name in bucket if self.parameters[name].grad is not None], learning_rate, grad_scale
            )

    def zero_grad(self) -> None:
        """Free every gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The states themselves, by parameter name: ``exp_avg``, ``exp_avg_sq`` and, for bf16, ``master``."""
        return {name: dict(states) for name, states in self._states.items()}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The states themselves, flat under ``NAME.KEY`` as safetensors wants them, and the steps by name."""
        return self._flat(), dict(self.steps)

    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int], *, strict: bool = True) -> None:
        """Copy saved states in, exactly.

        Args:
            tensors, steps: what ``state_dict`` gave.
            strict: the saved parameters must be these parameters. If not, saved states of others are passed
                over, and parameters of which nothing is saved stay as they are: new ones, after a growth.

        Raises:
            CheckpointMismatch: names differ (if strict), shapes or dtypes differ, or a parameter's states
                are there in part.
        """
        own = self._flat()
        wanted = [name for name in self.steps if strict or name in steps]
        keys = [f"{name}.{key}" for name in wanted for key in self._states[name]]
        missing = [name for name in wanted if name not in steps] + [key for key in keys if key not in tensors]
        unknown = [key for key in (*steps, *tensors) if key not in self.steps and key not in own] if strict else []
        wrong = [key for key in keys if key in tensors and not _alike(own[key], tensors[key])]
        if missing or unknown or wrong:
            parts = {"missing": missing, "unknown": unknown, "of another shape or dtype": wrong}
            told = "; ".join(f"{what}: {_shorten(names)}" for what, names in parts.items() if names)
            raise CheckpointMismatch(
                f"the saved optimizer state does not fit the trained parameters: {told}. "
                "It was saved under another plan or another precision.",
                missing=missing,
                unknown=unknown,
                wrong=wrong,
            )
        for key in keys:
            own[key].copy_(tensors[key])
        self.steps.update({name: steps[name] for name in wanted})

    def _flat(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, states in self._states.items() for key, tensor in states.items()}

    def _step_bucket(self, names: list[str], learning_rate: float, grad_scale: float) -> None:
        if not names:
            return
        weights = [self.parameters[name].detach() for name in names]
        states = [self._states[name] for name in names]
        masters = [state.get("master", weight) for state, weight in zip(states, weights, strict=True)]
        adamw(
            masters,
            [self._gradient(name, grad_scale) for name in names],
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

    def _gradient(self, name: str, scale: float) -> Tensor:
        gradient = self.parameters[name].grad
        assert gradient is not None
        if gradient.dtype != torch.float32:
            gradient = gradient.float()
            return gradient if scale == 1.0 else gradient.mul_(scale)
        return gradient if scale == 1.0 else gradient * scale


def carry_state(
    tensors: Mapping[str, Tensor], steps: Mapping[str, int], renamed: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Optimizer state under the names that the parameters have after a growth.

    Args:
        tensors, steps: what ``MasterAdamW.state_dict`` gave.
        renamed: old name -> new name of every weight that outlives the growth. Adapters must not be among
            them: they are merged, and those after the growth are fresh, though they bear the same names.

    Returns:
        Tensors (not copied) and steps, for ``load_state_dict(…, strict=False)``.
    """
    flat = {}
    for key, tensor in tensors.items():
        name, _, state = key.rpartition(".")
        if name in renamed:
            flat[f"{renamed[name]}.{state}"] = tensor
    return flat, {renamed[name]: count for name, count in steps.items() if name in renamed}


@torch.no_grad()
def global_grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm over all gradients, an fp32 scalar; bf16 gradients are summed in fp32."""
    norms = []
    for parameter in parameters:
        if parameter.grad is not None:
            # Row by row: on a CPU one running fp32 sum over 16M elements is off by 1%.
            rows = torch.linalg.vector_norm(parameter.grad, dim=-1, dtype=torch.float32)
            norms.append(torch.linalg.vector_norm(rows))
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip_coefficient(norm: Tensor | float, max_norm: float | None) -> float:
    """The factor, at most 1, that brings a gradient of this norm down to ``max_norm`` (``None``: 1)."""
    if max_norm is None:
        return 1.0
    value = float(norm)
    return value if math.isnan(value) else min(1.0, max_norm / (value + 1e-6))


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
