"""Training methods: each defines which parts of the model are trained in every phase of a stage.

To add a method, write a generator and add it to ``METHODS``. A generator takes the numbers of new and old layers of a
stage and its number of optimizer steps, and yields one ``Draft`` per phase. If the number of steps is None, it yields
each kind of phase once, with its share of the steps. The planner uses these to compute costs before it knows the steps.
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
from steplm.schedule import Adapter, Entry, Frozen, Phase, Role, Trained
from steplm.types import ModelShape

# alpha / rank. The best values among 1, 2, 4, 8 and 16 are around here, at no cost in memory (docs/results.md).
ALPHA_OF_RANK = 4.0


class Draft(NamedTuple):
    """A phase without its position in the run."""

    entry: Entry
    layers: tuple[Role, ...]
    embeddings_and_head: Role
    steps: float  # or the share of the stage's steps, if their number is not known yet

    @property
    def phase(self) -> Phase:
        """The phase, at no position and of no length."""
        return Phase(0, 0, self.entry, self.layers, self.embeddings_and_head, 0, 0, 0)


@dataclass(frozen=True)
class Parts:
    """The roles and layer maps that a configuration names, from which generators build phases."""

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
        adapter_shapes(self.shape, adapter)  # raises if the rank is too large
        return adapter

    @cached_property
    def outside(self) -> Role:
        """The role of embeddings, final norm and head once there are old layers."""
        choice = self.config.plan.train_embeddings
        if choice == "adapters":
            return self.adapter
        return Trained() if choice == "always" else Frozen()


def vanilla(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Ordinary pre-training, which trains everything."""
    yield Draft(Entry("fresh"), (parts.trained,) * num_new, Trained(), num_steps or 1)


def step(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Train new layers and freeze old ones under adapters (arXiv 2504.04151)."""
    old = parts.adapter if num_old and parts.config.pet.method != "none" else Frozen()
    return _grown(parts, num_new, num_old, num_steps, old)


def growth(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Add layers, and train every layer in every stage (stacking: arXiv 2405.15319)."""
    return _grown(parts, num_new, num_old, num_steps, parts.trained)


def thawed(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Like ``growth``, but old layers have their own update rule, with fewer optimizer states."""
    return _grown(parts, num_new, num_old, num_steps, Trained(parts.config.optim.old_layers or ""))


def lora(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Freeze every layer under adapters from the start (arXiv 2106.09685)."""
    yield Draft(Entry("fresh"), (parts.adapter,) * num_new, Trained(), num_steps or 1)


def relora(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Train all layers as a warm start, then adapters that are repeatedly merged and replaced (arXiv 2307.05695)."""
    pet = parts.config.pet
    warm: float = 0
    if pet.warm_start:
        warm = pet.warm_start if num_steps is None else round(pet.warm_start * num_steps)
        _require_steps(parts, warm, num_steps)
        yield Draft(Entry("fresh"), (parts.trained,) * num_new, Trained(), warm)
    outside = parts.outside if pet.warm_start else Trained()
    rounds = [1 - warm] if num_steps is None else _rounds(parts, num_steps - round(warm))
    for index, steps in enumerate(rounds):
        yield Draft(Entry("merge" if index or warm else "fresh"), (parts.adapter,) * num_new, outside, steps)


def badam(parts: Parts, num_new: int, num_old: int, num_steps: int | None) -> Iterator[Draft]:
    """Train one layer at a time, in addition to embeddings and head (arXiv 2404.02827)."""
    switch_steps = parts.config.optim.switch_steps
    last_turn = num_new if num_steps is None else -(-num_steps // switch_steps)
    for turn in range(last_turn):
        active = active_block(turn, num_blocks=num_new, seed=parts.config.seed)
        layers: list[Role] = [Frozen()] * num_new
        layers[active] = parts.trained
        steps = 1 / num_new if num_steps is None else min(switch_steps, num_steps - turn * switch_steps)
        yield Draft(Entry("go_on" if turn else "fresh"), tuple(layers), Trained(), steps)


def active_block(turn: int, *, num_blocks: int, seed: int) -> int:
    """The index of the block that is trained in a turn.

    Each pass over the ``num_blocks`` blocks trains every block once, in an order drawn from ``seed`` and the number of
    the pass.
    """
    order = list(range(num_blocks))
    random.Random(f"{seed}:{turn // num_blocks}").shuffle(order)
    return order[turn % num_blocks]


@dataclass(frozen=True)
class Method:
    """A generator, and which of ``METHOD_KEYS`` it reads."""

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

# Keys that only some methods read. A method rejects those it does not read, unless they have their default value.
METHOD_KEYS = tuple(dict.fromkeys(key for method in METHODS.values() for key in method.reads))


def check_keys(config: RunConfig) -> None:
    """Check that the method reads every key that is set, and can use its value.

    Raises:
        ConfigError: a key is not read, or a value cannot be used; the message says what to change.
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


def written(config: RunConfig, key: str) -> Any:
    """The value of ``section.key``."""
    return value_and_default(config, key)[0]


def value_and_default(config: RunConfig, key: str) -> tuple[Any, Any]:
    """The value and the default of ``section.key``."""
    section_name, _, name = key.partition(".")
    section = getattr(config, section_name)
    return getattr(section, name), type(section).model_fields[name].default


def _grown(parts: Parts, num_new: int, num_old: int, num_steps: int | None, old: Role) -> Iterator[Draft]:
    """Train new layers in full, and old ones, which keep the role ``old`` through all restarts of their adapters."""
    if num_old == 0:
        yield from vanilla(parts, num_new, num_old, num_steps)
        return
    config = parts.config
    layer_map = make_layer_map(num_old, num_new, config.growth.resolved_position, config.seed)
    layers = tuple(parts.trained if origin.is_new else old for origin in layer_map.origins)
    grow = Entry("grow", layer_map, config.growth.operator)
    for index, steps in enumerate(_rounds(parts, num_steps)):
        yield Draft(Entry("merge") if index else grow, layers, parts.outside, steps)


def _rounds(parts: Parts, num_steps: int | None) -> list[int]:
    """The number of steps in each round of adapters; [1], as a share, if ``num_steps`` is None."""
    if num_steps is None:
        return [1]
    num_rounds = parts.config.pet.restarts + 1
    rounds = divide(num_steps, [1 / num_rounds] * num_rounds)
    _require_steps(parts, min(rounds), num_steps)
    return rounds


def _require_steps(parts: Parts, steps: float, num_steps: int | None) -> None:
    pet = parts.config.pet
    if num_steps is not None and steps < 1:
        raise ConfigError(
            f"{num_steps} steps are too few for pet.restarts={pet.restarts} and pet.warm_start={pet.warm_start:g}: "
            "each part needs a step. Lower them, or give the run more tokens.",
            num_steps=num_steps,
        )
