"""Where new layers go: a position is a function ``(num_old, num_new, seed) -> LayerMap``.

``N`` old layers have ``N - 1`` gaps between neighbors, numbered from the bottom. If there are more
new layers than gaps, every gap takes the same number and the position chooses the gaps that take one
more. A single old layer has no gap; new layers then go above it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from steplm.errors import ConfigError, GrowthError
from steplm.types import LayerMap, LayerOrigin
from steplm.units import nearest


def make_layer_map(num_old: int, num_new: int, position: str, seed: int = 0) -> LayerMap:
    """The origins of ``num_old + num_new`` layers, bottom to top.

    Args:
        num_old: layers of the old model, at least 1.
        num_new: layers to add, at least 1.
        position: a key of ``POSITIONS``.
        seed: used by the position "random" only.

    Raises:
        ConfigError: the position is unknown.
        GrowthError: fewer than one old or new layer.
    """
    if position not in POSITIONS:
        raise ConfigError(f"there is no position {position!r}.{nearest(position, POSITIONS)}", position=position)
    if num_old < 1 or num_new < 1:
        raise GrowthError(
            f"cannot add {num_new} layers to {num_old}: both must be at least 1.",
            num_old=num_old,
            num_new=num_new,
        )
    return POSITIONS[position](num_old, num_new, seed)


def upper(num_old: int, num_new: int, seed: int) -> LayerMap:
    """The highest gaps."""
    return _in_gaps(num_old, num_new, lambda num_gaps, count: range(num_gaps - count, num_gaps))


def intermediate(num_old: int, num_new: int, seed: int) -> LayerMap:
    """The middle gaps."""
    return _in_gaps(num_old, num_new, lambda num_gaps, count: range(num_gaps)[(num_gaps - count) // 2 :][:count])


def lower(num_old: int, num_new: int, seed: int) -> LayerMap:
    """The lowest gaps."""
    return _in_gaps(num_old, num_new, lambda num_gaps, count: range(count))


def random_gaps(num_old: int, num_new: int, seed: int) -> LayerMap:
    """Gaps drawn without replacement, always the same for a given seed and sizes."""
    # Sizes are part of the seed so that the stages of one run draw independently.
    generator = random.Random(f"{seed}:{num_old}:{num_new}")
    return _in_gaps(num_old, num_new, lambda num_gaps, count: generator.sample(range(num_gaps), count))


def even(num_old: int, num_new: int, seed: int) -> LayerMap:
    """Gaps spread over the depth, at the midpoints of equal intervals."""
    return _in_gaps(
        num_old,
        num_new,
        lambda num_gaps, count: [(2 * k + 1) * num_gaps // (2 * count) for k in range(count)],
    )


def top(num_old: int, num_new: int, seed: int) -> LayerMap:
    """Stack copies of the old layers on top of them: new layer ``j`` comes from old layer ``j mod N``.

    Source: G_stack (arXiv 2405.15319).
    """
    kept = [LayerOrigin((layer,)) for layer in range(num_old)]
    return LayerMap((*kept, *(LayerOrigin((j % num_old,), is_new=True) for j in range(num_new))))


POSITIONS: dict[str, Callable[[int, int, int], LayerMap]] = {
    "upper": upper,
    "intermediate": intermediate,
    "lower": lower,
    "random": random_gaps,
    "even": even,
    "top": top,
}


def _in_gaps(num_old: int, num_new: int, choose: Callable[[int, int], Iterable[int]]) -> LayerMap:
    """Insert new layers between neighbors; ``choose(num_gaps, count)`` returns the gaps that take one more."""
    num_gaps = num_old - 1
    if num_gaps == 0:
        return LayerMap((LayerOrigin((0,)), *(LayerOrigin((0,), is_new=True) for _ in range(num_new))))
    in_every_gap, remainder = divmod(num_new, num_gaps)
    gets_one_more = set(choose(num_gaps, remainder)) if remainder else set()
    origins = []
    for gap in range(num_gaps):
        origins.append(LayerOrigin((gap,)))
        count = in_every_gap + (gap in gets_one_more)
        origins += [LayerOrigin((gap, gap + 1), is_new=True, fraction=(j + 1) / (count + 1)) for j in range(count)]
    return LayerMap((*origins, LayerOrigin((num_gaps,))))
