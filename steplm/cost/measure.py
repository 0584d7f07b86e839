"""Measured model-state memory of a model and its optimizer, by the plan's components and kinds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steplm.cost.terms import COMPONENTS, LANDING, OUTER_COMPONENTS
from steplm.errors import ConfigError, MemoryMismatch
from steplm.rows import on_this_rank
from steplm.types import HOST_OPTIMIZER, MemoryEstimate, MemoryTerm
from steplm.units import format_bytes

ADAPTER_TENSORS = ("lora_A", "lora_B")  # last name components of adapter parameters


class HasStateTensors(Protocol):
    """An optimizer that exposes its state tensors by parameter name and state name."""

    def state_tensors(self) -> Mapping[str, Mapping[str, Tensor]]: ...


class HoldsTensors(Protocol):
    """Parameters in host memory that expose all tensors with parameter name (None: of no parameter) and kind."""

    def tensors(self) -> Iterator[tuple[str | None, str, Tensor]]: ...


def measure_model_state(
    model: nn.Module,
    optimizer: HasStateTensors,
    num_hidden_layers: int,
    *,
    host: HoldsTensors | None = None,
    packed: Iterable[tuple[str, str, Tensor]] = (),
    expect_gradients: bool = False,
) -> MemoryEstimate:
    """Bytes of the storages behind weights, gradients and optimizer states, by component and kind.

    A storage shared by several tensors counts once, for the first of them.

    Args:
        host: copies of the trained parameters in host memory; the optimizer's states are then there too.
        packed: component, kind and tensor of weights stored outside the model's parameters.
        expect_gradients: if a trained parameter has no gradient yet, count the one it will get. With ``host``, its
            gradient buffers are counted instead.

    Raises:
        ConfigError: the model has no list of ``num_hidden_layers`` layers.
    """
    prefix, _ = find_layers(model, num_hidden_layers)
    head_name = name_of_head(model)
    components = {name: _component(name, parameter, prefix, head_name) for name, parameter in model.named_parameters()}
    held: dict[tuple[str, str], int] = defaultdict(int)  # (component, kind) -> bytes
    seen: set[int] = set()

    def add(component: str, kind: str, tensor: Tensor) -> None:
        local = on_this_rank(tensor)
        storage = local.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            held[component, kind] += storage.nbytes()

    # Before the weights, because some of these may be in host memory.
    for name_or_none, kind, tensor in () if host is None else host.tensors():
        add(LANDING if name_or_none is None else components[name_or_none], kind, tensor)
    for name, parameter in model.named_parameters():
        component = components[name]
        add(component, "weights", parameter.detach())
        if parameter.grad is not None and hasattr(parameter.grad, "to_local"):
            held[component, "gradients"] += on_this_rank(
                parameter.grad
            ).nbytes  # a layer's gradients are views of one storage
        elif parameter.grad is not None:
            add(component, "gradients", parameter.grad)
        elif expect_gradients and parameter.requires_grad and host is None:
            dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
            held[component, "gradients"] += on_this_rank(parameter).numel() * dtype.itemsize
    for name, states in optimizer.state_tensors().items():
        for state in states.values():
            add(components[name], "optimizer" if host is None else HOST_OPTIMIZER, state)
    for component, kind, tensor in packed:
        add(component, kind, tensor)
    return MemoryEstimate(
        tuple(MemoryTerm(component, kind, num_bytes, "measured") for (component, kind), num_bytes in held.items())
    )


def comparable(measured: MemoryEstimate, planned: MemoryEstimate) -> MemoryEstimate:
    """The measurement, without embeddings, final norm and head if the plan does not count them."""
    if any(term.component in OUTER_COMPONENTS for term in planned.terms):
        return measured
    left_out = (*OUTER_COMPONENTS, LANDING)
    return MemoryEstimate(tuple(term for term in measured.terms if term.component not in left_out))


def check_against_plan(measured: MemoryEstimate, planned: MemoryEstimate) -> None:
    """Require that plan and measurement agree to the byte in every ``comparable`` row.

    Raises:
        MemoryMismatch: rows differ; the message tabulates them.
    """
    measured = comparable(measured, planned)
    found = dict.fromkeys((term.component, term.kind) for term in (*planned.terms, *measured.terms))
    rows = sorted(found, key=lambda row: ([*COMPONENTS, row[0]].index(row[0]), row))
    differing = [
        (component, kind, planned.bytes_of(component, kind), measured.bytes_of(component, kind))
        for component, kind in rows
        if planned.bytes_of(component, kind) != measured.bytes_of(component, kind)
    ]
    if differing:
        table = [f"{'':<26}{'planned':>18}{'measured':>18}{'difference':>18}"]
        table += [f"{f'{c} {k}':<26}{p:>18,}{m:>18,}{m - p:>+18,}" for c, k, p, m in differing]
        raise MemoryMismatch(
            "the measured model-state bytes are not the planned bytes:\n"
            + "\n".join(table)
            + "\nThe model, its trained parameters or its optimizer are not those of the plan; "
            "make the plan again from the same configuration.",
            rows=differing,
        )


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory since ``reset_peak``; None where unknown."""

    peak_allocated_bytes: int | None = None  # tensors on the accelerator
    peak_reserved_bytes: int | None = None  # reserved by the accelerator's allocator, including fragmentation
    peak_resident_bytes: int | None = None  # the whole process in host memory, including libraries

    def __str__(self) -> str:
        labeled = {
            "allocated": self.peak_allocated_bytes,
            "reserved": self.peak_reserved_bytes,
            "resident": self.peak_resident_bytes,
        }
        known = [f"{format_bytes(count)} {label}" for label, count in labeled.items() if count is not None]
        return f"peak {', '.join(known)}" if known else "peak unknown"


def measure_peak(device: torch.device | str) -> PeakMemory:
    """Peak memory of an accelerator's tensors and allocator, or of this process on a CPU."""
    if torch.device(device).type == "cuda":
        return PeakMemory(
            peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
        )
    return PeakMemory(peak_resident_bytes=_peak_resident_bytes())


def reset_peak(device: torch.device | str) -> None:
    """Reset the peak. On a CPU the old peak remains if the system offers no reset."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: sets the peak resident size to the current one


def _peak_resident_bytes() -> int | None:
    # Try this before getrusage, where a child process starts with its parent's peak.
    with suppress(OSError), open("/proc/self/status") as file:
        match = re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE)
        if match:
            return int(match.group(1)) * 1024
    try:
        import resource
    except ImportError:
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def find_layers(model: nn.Module, num_hidden_layers: int) -> tuple[str, nn.ModuleList]:
    """Name and ``ModuleList`` of the decoder layers: the outermost list of that length.

    Raises:
        ConfigError: the model has no such list.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_hidden_layers:
            return name, module
    raise ConfigError(
        f"{type(model).__name__} has no list of {num_hidden_layers} layers: only decoder-only models whose "
        "layers are one ModuleList can be planned and grown.",
        num_hidden_layers=num_hidden_layers,
    )


def name_of_head(model: nn.Module) -> str | None:
    """Name of the module that computes the logits, or None."""
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return next((name for name, module in model.named_modules() if module is head), None)


def outer_component(name: str, parameter: Tensor, head_name: str | None) -> str:
    """Component of a parameter outside the layers: ``head``, ``final_norm`` (other vectors) or ``embeddings``."""
    if head_name is not None and name.startswith(f"{head_name}."):
        return "head"
    return "final_norm" if parameter.dim() == 1 else "embeddings"


def _component(name: str, parameter: Tensor, prefix: str, head_name: str | None) -> str:
    if name.rpartition(".")[2] in ADAPTER_TENSORS:
        return "adapters"
    if not name.startswith(f"{prefix}."):
        return outer_component(name, parameter, head_name)
    return "trained_layers" if parameter.requires_grad else "frozen_layers"
