"""Bytes of the storage formats, and the sizes that formula and implementation share.

An 8-bit optimizer state is one code per element and one fp32 scale per block; a vector stays fp32. An int8 matrix
has one fp32 scale per row; an NF4 matrix has two codes per byte and one bf16 scale per block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from math import gcd

STATE_BLOCK = 256  # elements of an 8-bit optimizer state that share a scale
NF4_BLOCK = 64  # elements of an NF4 weight that share a scale
STEP_CHUNK = 2**22  # elements that the optimizer updates at once
CODE_BOOK_BYTES = 659_448  # tables of an optimizer with 8-bit states, on each device
MIN_OFFLOADED_BYTES = 64 * 2**10  # a smaller activation costs more time than it saves memory
PACK_CHUNK = 2**22  # elements of a packed matrix that are in fp32 at once; a multiple of NF4_BLOCK


def state_bytes(num_parameters: int) -> int:
    """One moment of one matrix in 8 bits. Source: Dettmers et al. (arXiv 2110.02861), section 2."""
    return num_parameters + 4 * _blocks(num_parameters, STATE_BLOCK)


def int8_bytes(out_features: int, in_features: int) -> int:
    """A frozen matrix in int8, a scale for each row."""
    return out_features * in_features + 4 * out_features


def nf4_bytes(out_features: int, in_features: int) -> int:
    """A frozen matrix in 4-bit NormalFloat. Source: QLoRA (arXiv 2305.14314), section 3, with bf16 scales."""
    num_parameters = out_features * in_features
    return _blocks(num_parameters, 2) + 2 * _blocks(num_parameters, NF4_BLOCK)


FROZEN_FORMATS: dict[str, Callable[[int, int], int]] = {
    "int8": int8_bytes,
    "nf4": nf4_bytes,
}


def _blocks(num_elements: int, block: int) -> int:
    return -(-num_elements // block)


def step_bytes(bucket: int, piece: int, *, states: str, masters: str) -> int:
    """Workspace of the optimizer; see ``steplm.optim.adamw.AdamW``.

    Args:
        bucket: elements that it updates at once.
        piece: elements of the largest tensor, or part of one, among them: what is rounded at once.
        masters: ``fp32`` (also where the weight is), ``8bit`` or ``none``.
    """
    update = 4 * bucket + (0 if masters == "fp32" else 4 * bucket)  # the gradient, and the weight, in fp32
    round_weights = {"fp32": 0, "8bit": 4 * bucket + 4 * piece, "none": 4 * bucket + 5 * piece}[masters]
    if states != "8bit":
        return max(update, round_weights)
    moments = 8 * bucket
    return moments + max(update, round_weights, 9 * piece)


def is_low_rank(rows: int, columns: int, rank: int) -> bool:
    """Whether a matrix of this shape can have states of this rank, which is to be below both its sides."""
    return min(rows, columns) > rank


def low_rank_state_bytes(method: str, rows: int, columns: int, rank: int) -> int:
    """Fp32 states of one matrix, without its master weight; see ``steplm.optim.low_rank.LowRankAdamW``.

    Two moments of rank × larger side, and the projector of GaLore (arXiv 2403.03507, table 1) or the norm of
    APOLLO's last update (arXiv 2412.05270). APOLLO-Mini has rank 1, whatever ``rank`` is.
    """
    small, large = sorted((rows, columns))
    rank = 1 if method == "apollo_mini" else rank
    return 8 * rank * large + (4 * small * rank if method == "galore" else 4)


def low_rank_step_bytes(method: str, rows: int, columns: int, rank: int, *, width: int, has_master: bool) -> int:
    """Workspace of updating one such matrix, in a step that renews its projector.

    Left out: what LAPACK or its like takes inside a decomposition.

    Args:
        width: bytes of a number of the weight and its gradient: 2 or 4.
        has_master: whether there is an fp32 copy of a weight of 2 bytes.
    """
    small, large = sorted((rows, columns))
    rank = 1 if method == "apollo_mini" else rank
    whole, projected, projector = 4 * small * large, 4 * rank * large, 4 * rank * small
    gradient = whole if width < 4 else 0
    weight = whole if width < 4 and not has_master else 0
    rounding = weight and weight + 5 * small * large  # random bits (4) and mask (1)
    if method == "galore":
        renewal = 16 * small * small + 8 * (small + 1)  # in fp64, gradient times its transpose and eigenvectors
        return max(renewal, gradient + projected, 2 * projected + 4, projected + weight, rounding)
    num_factors = 1 if method == "apollo_mini" else large  # one for the matrix, or for each column
    factors = 9 * num_factors  # two norms (4), and mask (1)
    update = max(projector + projected, 2 * projected + factors, 8 * large, weight + 4 * num_factors)
    return max(gradient + update, rounding)


def unpack_bytes(fmt: str, num_parameters: int, width: int) -> int:
    """What it takes to make one packed matrix whole, of ``width`` bytes a parameter; see ``steplm.pet.packing``."""
    chunk = {"full": 0, "int8": 4, "nf4": 6}[fmt] * min(num_parameters, PACK_CHUNK)
    return 0 if fmt == "full" else num_parameters * width + chunk


def largest_bucket(sizes: Iterable[int]) -> int:
    """Elements of the largest group that the optimizer updates at once, of tensors of these sizes in their order.

    A tensor is cut into pieces of ``STEP_CHUNK`` elements; a group is as many pieces as fit into that.
    """
    largest = size = 0
    for num_elements in sizes:
        if num_elements >= STEP_CHUNK:
            return STEP_CHUNK
        size = num_elements if size + num_elements > STEP_CHUNK else size + num_elements
        largest = max(largest, size)
    return largest


NEWTON_SCHULZ_STEPS = 5  # of an update of Muon
SIGNED_CODE_BOOK_BYTES = CODE_BOOK_BYTES // 2  # tables of a rule with 8-bit momentum, on each device


def maps_at_once(rows: int, columns: int) -> int:
    """How many maps of this shape a rule for matrices updates at once: ``STEP_CHUNK`` elements at most, or one map."""
    return max(1, STEP_CHUNK // (rows * columns))


def row_pieces(rows: int, columns: int) -> list[slice]:
    """The rows of a matrix whose momentum and weights are in fp32 at once.

    ``STEP_CHUNK`` elements at most, and a piece begins where a block of an 8-bit state does. (Of matrices with more
    than ``STEP_CHUNK / STATE_BLOCK`` columns a piece may be larger: the fewest rows that end with a block.)
    """
    size = _rows_of_piece(columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _rows_of_piece(columns: int) -> int:
    unit = STATE_BLOCK // gcd(columns, STATE_BLOCK)  # rows that make whole blocks
    return max(unit, STEP_CHUNK // columns // unit * unit)


def momentum_bytes(rows: int, columns: int, states: str) -> int:
    """Momentum of one map. Source of its 8 bits: arXiv 2509.23106."""
    size = rows * columns
    return {"fp32": 4 * size, "bf16": 2 * size, "8bit": state_bytes(size)}[states]


def muon_state_bytes(rows: int, columns: int, states: str) -> int:
    """States of one map, without what is held beside its weight; see ``steplm.optim.muon.Muon``."""
    return momentum_bytes(rows, columns, states)


def muon_step_bytes(
    maps: Iterable[tuple[int, int]], *, states: str, masters: str, compute_width: int, num_shards: int = 1
) -> int:
    """Workspace of Muon's update of maps of these shapes: in a step all maps of the rule, in a fused backward pass
    those of one parameter.

    Left out: what a matrix product takes inside itself.

    Args:
        maps: rows and columns of every map, of all ranks together.
        states: format of the momentum.
        masters: ``fp32`` (also where the weight is), ``8bit`` or ``none``.
        compute_width: bytes of a number in Newton–Schulz: 2 on CUDA, 4 elsewhere.
        num_shards: ranks that share the rows of every map. Each gathers its share of the maps.
    """
    most = 0
    for batch, rows, columns in _muon_batches(maps, num_shards):
        updates = compute_width * batch * rows * columns
        pieces = _piece_bytes(rows // num_shards, columns, states=states, masters=masters)
        most = max(most, updates + pieces, _newton_schulz_bytes(batch, rows, columns, compute_width))
    return most


def muon_product_bytes(maps: Iterable[tuple[int, int]], *, compute_width: int) -> int:
    """Of ``muon_step_bytes``, what Newton–Schulz holds."""
    return max((_newton_schulz_bytes(*batch, compute_width) for batch in _muon_batches(maps)), default=0)


def _muon_batches(maps: Iterable[tuple[int, int]], num_shards: int = 1) -> Iterator[tuple[int, int, int]]:
    """Of each shape, how many maps a rank updates at once, and their rows, with those that fill up, and columns."""
    for (rows, columns), count in Counter(maps).items():
        whole = -(-rows // num_shards) * num_shards
        yield -(-min(count, num_shards * maps_at_once(whole, columns)) // num_shards), whole, columns


def _newton_schulz_bytes(batch: int, rows: int, columns: int, compute_width: int) -> int:
    """Two times the maps that are updated together, and a square for each."""
    return compute_width * batch * (2 * rows * columns + min(rows, columns) ** 2)


def scale_state_bytes(rows: int, columns: int, states: str, *, momentum: bool = False) -> int:
    """States of one map, without what is held beside its weight; see ``steplm.optim.scale.SCALE``."""
    return momentum_bytes(rows, columns, states) if momentum else 0


def scale_step_bytes(
    maps: Iterable[tuple[int, int]], *, states: str, masters: str, momentum: bool = False, norm: str = "column"
) -> int:
    """Workspace of SCALE's update of maps of these shapes; arguments as of ``muon_step_bytes``."""
    most = 0
    for (rows, columns), count in Counter(maps).items():
        batch = min(count, maps_at_once(rows, columns))
        updates = 4 * batch * rows * columns
        pieces = _piece_bytes(rows, columns, states=states if momentum else None, masters=masters)
        norms = 4 * batch * {"column": rows, "row": columns, "both": max(rows, columns), "sign": 0}[norm]
        most = max(most, updates + max(pieces, norms))
    return most


def _piece_bytes(rows: int, columns: int, *, states: str | None, masters: str) -> int:
    """Workspace of reading and writing the momentum (None: there is none), or the weight, of one piece of a map."""
    # Momentum: its fp32 copy (4) beside the gradient's (4), or beside indices, boundaries and comparison (9).
    # Weight: its fp32 copy (4) beside the upper bits (4), or beside random bits (4) and mask (1).
    per_element = max(
        {None: 0, "fp32": 4, "bf16": 8, "8bit": 13}[states],
        {"fp32": 0, "8bit": 8, "none": 9}[masters],
    )
    return per_element * min(_rows_of_piece(columns), rows) * columns
