"""Adapters of a whole model: attach them, merge them into plain weights, read and load their tensors by name.

To add a method, write a class with ``LoRALinear``'s interface and add it to ``ADAPTERS``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steplm.errors import CheckpointMismatch, ConfigError
from steplm.pet.embedding import TiedLoRAHead, adapt_embedding, check_embedding
from steplm.pet.lora import LoRALinear, require_rank
from steplm.rows import WHOLE, Rows
from steplm.schedule import Adapter, Phase
from steplm.units import nearest

ADAPTERS: dict[str, type[LoRALinear]] = {
    "lora": LoRALinear,
}


def attach(model: nn.Module, phase: Phase, layer_prefix: str, seed: int) -> None:
    """Attach fresh adapters to all modules that have one in this phase; the model's output does not change.

    A head that is tied to the embedding shares its factors too, under the embedding's name.

    Args:
        layer_prefix: name of the list of layers, such as ``model.layers``.
        seed: together with a parameter's name, determines its initial value.

    Raises:
        ConfigError: unknown method; a target that is missing, not linear, or smaller than the rank.
    """
    outside = phase.embeddings_and_head
    targets: dict[str, tuple[nn.Linear | nn.Embedding, Adapter]] = {}  # all validated before the model is changed
    for index, spec in phase.adapters.items():
        if spec.method not in ADAPTERS:
            raise ConfigError(f"no adapter method {spec.method!r}. Known: {', '.join(ADAPTERS)}.", method=spec.method)
        found = _targets(model, f"{layer_prefix}.{index}", spec)
        targets.update({name: (module, spec) for name, module in found.items()})
    if isinstance(outside, Adapter):
        targets.update({name: (module, outside) for name, module in _outer_targets(model, outside).items()})
    for name, (module, spec) in targets.items():
        adapter: Any
        if isinstance(module, nn.Embedding):
            adapter = adapt_embedding(module, spec.rank, spec.scaling)
        else:
            adapter = ADAPTERS[spec.method](module, spec.rank, spec.scaling)
            model.set_submodule(name, adapter)
        with torch.no_grad():
            for key, factor in adapter.fresh_factors(seed, name).items():
                getattr(adapter, key).copy_(factor)
    if isinstance(outside, Adapter):
        _adapt_tied_head(model)


def merge_state(
    weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], phase: Phase, rows: Rows = WHOLE
) -> dict[str, Tensor]:
    """The plain weights with the adapters merged.

    Reads one tensor at a time, so with a mapping that loads on access only one matrix exists in addition to the result.
    Weights without an adapter are passed through, not copied.

    Args:
        phase: the phase in which the adapters were trained.
        rows: which rows of the full weights ``weights`` contains; ``adapters`` are unsharded.

    Raises:
        CheckpointMismatch: an adapter has no weight, or a different shape than the phase requires.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapters.items():
        module, _, key = name.rpartition(".")
        factors.setdefault(module, {})[key] = tensor
    merged = {}
    for name in weights:
        module, _, parameter = name.rpartition(".")
        weight = weights[name]
        if parameter == "weight" and module in factors:
            of_module, spec = factors.pop(module), _adapter_of(module, phase)
            method = ADAPTERS[spec.method]
            if method.row_factor in of_module:
                of_module[method.row_factor] = rows.cut(of_module[method.row_factor])
            expected = method.factor_shapes(weight.shape, spec.rank)
            found = {key: tuple(tensor.shape) for key, tensor in of_module.items()}
            if found != expected:
                raise CheckpointMismatch(
                    f"the adapter of {module!r} has the shapes {found}, but rank {spec.rank} on this "
                    f"weight wants {expected}.",
                    module=module,
                )
            weight = method.merge_weight(weight, of_module, spec.scaling)
        merged[name] = weight
    if factors:
        raise CheckpointMismatch(
            f"{len(factors)} adapters have no weight to be merged into, {sorted(factors)[0]!r} first.",
            modules=sorted(factors),
        )
    return merged


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by full name, ``…q_proj.lora_A``; not copied."""
    return {
        f"{name}.{key}": getattr(adapter, key).detach()
        for name, adapter in _adapters(model)
        for key in adapter.factor_names
    }


def fresh_adapter_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The initial values that ``attach`` gives the adapters' tensors, by full name, in fp32 on the CPU."""
    return {
        f"{name}.{key}": factor
        for name, adapter in _adapters(model)
        for key, factor in adapter.fresh_factors(seed, name).items()
    }


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy saved adapters into the model's; exact if the dtype is the same.

    Raises:
        CheckpointMismatch: names or shapes differ.
    """
    own = adapter_state(model)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or unknown or wrong:
        parts = [("missing", missing), ("unknown", unknown), ("of another shape", wrong)]
        told = "; ".join(f"{len(names)} {what} ({names[0]} …)" for what, names in parts if names)
        raise CheckpointMismatch(
            f"the saved adapters are not those of this model: {told}.",
            missing=missing,
            unknown=unknown,
            wrong=wrong,
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _adapter_of(module: str, phase: Phase) -> Adapter:
    in_layer = re.match(r".+?\.(\d+)\.", module)
    role = phase.layers[int(in_layer.group(1))] if in_layer else phase.embeddings_and_head
    if not isinstance(role, Adapter):
        raise CheckpointMismatch(f"the phase has no adapter on {module!r}.", module=module)
    return role


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules with adapter factors; if several share them, only the first."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        factors = [id(getattr(module, key)) for key in getattr(module, "factor_names", ())]
        if factors and seen.isdisjoint(factors):
            seen.update(factors)
            yield name, module


def _targets(model: nn.Module, layer_name: str, spec: Adapter) -> dict[str, nn.Linear]:
    """The modules of one layer that get an adapter, by full name."""
    modules = dict(model.get_submodule(layer_name).named_modules(prefix=layer_name))
    found = {name: module for name, module in modules.items() if name.rpartition(".")[2] in spec.target_modules}
    for target in spec.target_modules:
        if not any(name.endswith(f".{target}") for name in found):
            linears = sorted({name.rpartition(".")[2] for name in modules if type(modules[name]) is nn.Linear})
            hint = nearest(target, linears, otherwise=f" Linear layers there: {', '.join(linears) or 'none'}.")
            raise ConfigError(f"{layer_name} has no module {target!r} to adapt.{hint}", target=target, layer=layer_name)
    way_out = "Take it out of pet.target_modules, or set pet.method to none."
    return {name: _linear(name, module, spec, way_out) for name, module in found.items()}


def _outer_targets(model: Any, spec: Adapter) -> dict[str, nn.Linear | nn.Embedding]:
    """The embedding, and the head unless it is tied to the embedding, by full name."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    check_embedding(names[embedding], embedding, spec.rank)
    way_out = "Set plan.train_embeddings to always or first_stage."
    _linear(names.get(head, "the head"), head, spec, way_out)
    targets = {names[embedding]: embedding}
    return targets if head.weight is embedding.weight else {**targets, names[head]: head}


def _adapt_tied_head(model: Any) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        name = next(name for name, module in model.named_modules() if module is head)
        model.set_submodule(name, TiedLoRAHead(head, embedding))


def _linear(name: str, module: nn.Module | None, spec: Adapter, way_out: str) -> nn.Linear:
    """The module itself, if this method and rank can adapt it; raises ``ConfigError`` otherwise."""
    if type(module) is not nn.Linear:
        raise ConfigError(
            f"{name} is a {type(module).__name__}, and {spec.method} adapts only plain nn.Linear modules. {way_out}",
            target=name,
        )
    require_rank(name, module, spec.rank)
    return module
