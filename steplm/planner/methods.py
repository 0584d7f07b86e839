"""The methods: each says who is trained in every phase of a stage. To add one, write a generator and a line below.

A generator takes the number of new and of old layers of a stage, and its optimizer steps, and yields ``Draft``\\ s, one
a phase. Where the number of steps is None it yields each kind of phase once, with its share of the steps: that is
what the planner prices before there are tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from steplm.config import RunConfig
from steplm.cost.terms import adapter_shapes, resolve_target_modules
from steplm.errors import ConfigError
from steplm.planner.positions import make_layer_map
from steplm.planner.tokens import divide
from steplm.schedule import Adapter, Entry, Frozen, Role, Trained
from steplm.types import LayerMap, ModelShape

# Of 1, 2, 4, 8 and 16 the best lie here, and it costs no byte: docs/results.md.
ALPHA_OF_RANK = 4.0


class Draft(NamedTuple):
    """A phase without its place in the run."""

    entry: Entry
    layers: tuple[Role, ...]
    embeddings_and_head: Role
    steps: float  # or the share of the stage's steps, where these are not known


@dataclass(frozen=True)
class Parts:
    """What the generators put together: the roles and layer maps that a configuration names."""

    config: RunConfig
    shape: ModelShape

    @cached_property
    def trained(self) -> Trained:
        return Trained(self.config.optim.name)

    @cached_property
    def adapter(self) -> Adapter:
        pet = self.config.pet
        alpha = ALPHA_OF_RANK * pet.rank if pet.alpha is None else pet.alpha
        targets = resolve_target_modules(self.shape, pet.target_modules)
        adapter = Adapter(pet.rank, alpha, targets, pet.method, pet.rule)
        adapter_shapes(self.shape, adapter)  # refuses a rank that is too large
        return adapter

    @property
    def frozen(self) -> Role:
        """The role of an old layer in STEP."""
        return Frozen() if self.config.pet.method == "none" else self.adapter

    @cached_property
    def outside(self) -> Role:
        """The role of embeddings, final norm and head once there are old layers."""
        choice = self.config.plan.train_embeddings
        if choice == "adapters":
            return self.adapter
        return Trained() if choice == "always" else Frozen()

    def layer_map(self, num_new: int, num_old: int) -> LayerMap:
        return make_layer_map(num_old, num_new, self.config.growth.resolved_position, self.config.seed)


def vanilla(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Ordinary pre-training: all is trained."""
    yield Draft(Entry("fresh"), (parts.trained,) * num_new, Trained(), 1 if num_steps is None else num_steps)


def step(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """New layers are trained, old ones are frozen under adapters. arXiv 2504.04151."""
    if num_old == 0:
        yield from vanilla(parts, num_new, num_old, num_steps)
        return
    grow, layers = _grow(parts, num_new, num_old, parts.frozen)
    restarts = parts.config.pet.restarts if isinstance(parts.frozen, Adapter) else 0
    for index, steps in enumerate(_rounds(parts, num_steps, restarts)):
        yield Draft(Entry("merge") if index else grow, layers, parts.outside, steps)


def growth(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Layers are added, and every layer is trained in every stage. Stacking: arXiv 2405.15319."""
    yield from _with_trained_old_layers(parts, num_new, num_old, num_steps, parts.trained)


def thawed(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """As growth, and old layers are trained by a rule of their own, with fewer states."""
    yield from _with_trained_old_layers(
        parts, num_new, num_old, num_steps, Trained(parts.config.optim.old_layers or "")
    )


def lora(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Every layer is frozen under adapters from the start. arXiv 2106.09685."""
    steps = 1 if num_steps is None else num_steps
    yield Draft(Entry("fresh"), (parts.adapter,) * num_new, Trained(), steps)


def relora(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """An ordinary warm start, then adapters on all layers, merged and begun anew. arXiv 2307.05695."""
    pet = parts.config.pet
    warm: float = 0
    if pet.warm_start:
        warm = pet.warm_start if num_steps is None else round(pet.warm_start * num_steps)
        _require_steps(parts, warm, num_steps)
        yield Draft(Entry("fresh"), (parts.trained,) * num_new, Trained(), warm)
    outside = parts.outside if pet.warm_start else Trained()
    rounds = [1 - warm] if num_steps is None else _rounds(parts, num_steps - round(warm), pet.restarts)
    for index, steps in enumerate(rounds):
        yield Draft(Entry("merge" if index or warm else "fresh"), (parts.adapter,) * num_new, outside, steps)


def badam(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """One layer after the other is trained, beside embeddings and head. arXiv 2404.02827."""
    switch_steps = parts.config.optim.switch_steps
    last_turn = num_new if num_steps is None else -(-num_steps // switch_steps)
    for turn in range(last_turn):
        active = active_block(turn, num_blocks=num_new, seed=parts.config.seed)
        layers: list[Role] = [Frozen()] * num_new
        layers[active] = parts.trained
        steps = 1 / num_new if num_steps is None else min(switch_steps, num_steps - turn * switch_steps)
        yield Draft(Entry("go_on" if turn else "fresh"), tuple(layers), Trained(), steps)


def active_block(turn: int, *, num_blocks: int, seed: int) -> int:
    """Which of ``num_blocks`` blocks is trained in a turn.

    Each comes once in a pass over all of them; every pass has an order of its own, drawn from ``seed`` and the number
    of the pass.
    """
    order = list(range(num_blocks))
    random.Random(f"{seed}:{turn // num_blocks}").shuffle(order)
    return order[turn % num_blocks]


@dataclass(frozen=True)
class Method:
    """A generator, and the keys that it reads of ``METHOD_KEYS``."""

    phases: Callable[[Parts, int, int, int | None], Iterator[Draft]]
    reads: tuple[str, ...] = ()
    grows: bool = False  # can have more than one stage
    freezes: bool = False  # layers can be frozen


METHODS: dict[str, Method] = {
    "vanilla": Method(vanilla),
    "step": Method(step, ("plan.train_embeddings", "pet.restarts", "pet.restart_keep"), grows=True, freezes=True),
    "growth": Method(growth, ("plan.train_embeddings",), grows=True),
    "thawed": Method(thawed, ("plan.train_embeddings", "optim.old_layers"), grows=True),
    "lora": Method(lora, freezes=True),
    "relora": Method(
        relora, ("plan.train_embeddings", "pet.warm_start", "pet.restarts", "pet.restart_keep"), freezes=True
    ),
    "badam": Method(badam, freezes=True),
}

# Keys that only some methods read. A method refuses the others, unless they have their default.
METHOD_KEYS = tuple(dict.fromkeys(key for method in METHODS.values() for key in method.reads))


def check_keys(config: RunConfig) -> None:
    """Refuse keys that the method does not read, and values that it cannot use.

    Raises:
        ConfigError: naming the key and the methods that read it.
    """
    name, method = config.method, METHODS[config.method]
    for key in METHOD_KEYS:
        value, default = value_and_default(config, key)
        if key not in method.reads and value != default:
            readers = ", ".join(other for other, row in METHODS.items() if key in row.reads)
            raise ConfigError(f"method={name} does not read {key}, which is {value}: leave it out, or set method to "
                              f"one of {readers}.", key=key)  # fmt: skip
    if config.plan.num_stages > 1 and not method.grows:
        raise ConfigError(
            f"method={name} has one stage: set plan.num_stages=1 (it is {config.plan.num_stages}).",
            num_stages=config.plan.num_stages,
        )
    pet = config.pet
    if name in ("lora", "relora") and pet.method == "none":
        raise ConfigError(f"method={name} needs adapters: leave pet.method=none out.")
    if name == "relora" and not pet.restarts and not pet.warm_start:
        raise ConfigError("method=relora needs pet.restarts of 1 or more, or pet.warm_start: set one, or method=lora.")
    if name == "relora" and not pet.warm_start and config.plan.train_embeddings != "always":
        raise ConfigError(
            f"plan.train_embeddings={config.plan.train_embeddings} freezes embeddings and head once they are trained: "
            "give method=relora a warm start (pet.warm_start), or leave it out."
        )
    if name == "thawed" and config.optim.old_layers is None:
        raise ConfigError("method=thawed needs a rule for the old layers: set optim.old_layers, such as apollo_mini.")
    if name in ("growth", "thawed") and config.plan.train_embeddings == "adapters":
        raise ConfigError("plan.train_embeddings=adapters goes with adapters on frozen layers: set method=step.")


def value_and_default(config: RunConfig, key: str) -> tuple[Any, Any]:
    """Of ``section.key``."""
    section_name, _, name = key.partition(".")
    section = getattr(config, section_name)
    return getattr(section, name), type(section).model_fields[name].default


def _grow(parts: Parts, num_new: int, num_old: int, old: Role) -> tuple[Entry, tuple[Role, ...]]:
    """The entry of a stage that adds layers, and the roles of its layers."""
    layer_map = parts.layer_map(num_new, num_old)
    layers = tuple(parts.trained if origin.is_new else old for origin in layer_map.origins)
    return Entry("grow", layer_map, parts.config.growth.operator), layers


def _with_trained_old_layers(
    parts: Parts, num_new: int, num_old: int, num_steps: int | None, old: Trained
) -> Iterator[Draft]:
    if num_old == 0:
        yield from vanilla(parts, num_new, num_old, num_steps)
        return
    yield Draft(*_grow(parts, num_new, num_old, old), parts.outside, 1 if num_steps is None else num_steps)


def _rounds(parts: Parts, num_steps: int | None, restarts: int) -> list[float]:
    """Steps of each round of adapters."""
    if num_steps is None:
        return [1]
    rounds = divide(num_steps, [1 / (restarts + 1)] * (restarts + 1))
    _require_steps(parts, min(rounds), num_steps)
    return list(rounds)


def _require_steps(parts: Parts, steps: float, num_steps: int | None) -> None:
    pet = parts.config.pet
    if num_steps is not None and steps < 1:
        raise ConfigError(
            f"{num_steps} steps are too few for pet.restarts={pet.restarts} and pet.warm_start={pet.warm_start:g}: "
            "each part needs a step. Lower them, or give the run more tokens.",
            num_steps=num_steps,
        )
