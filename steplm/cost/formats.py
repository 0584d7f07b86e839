"""Bytes of the storage formats, and the constants that the formulas share with the implementation.

An 8-bit optimizer state is one code per element and one fp32 scale per block; states of vectors stay in fp32. An int8
matrix has one fp32 scale per row; an NF4 matrix has two codes per byte and one bf16 scale per block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import gcd, prod
from types import MappingProxyType

STATE_BLOCK = 256  # elements of an 8-bit optimizer state that share a scale
NF4_BLOCK = 64  # elements of an NF4 weight that share a scale
STEP_CHUNK = 2**22  # elements that the optimizer updates at once
CODE_BOOK_BYTES = 659_448  # lookup tables of an optimizer with 8-bit states, on each device
MIN_OFFLOADED_BYTES = 64 * 2**10  # moving a smaller activation saves too little memory for the time it takes
PACK_CHUNK = 2**22  # elements of a quantized matrix that are in fp32 at once; a multiple of NF4_BLOCK


def state_bytes(num_parameters: int) -> int:
    """Bytes of one 8-bit moment of a matrix. Source: Dettmers et al. (arXiv 2110.02861), section 2."""
    return num_parameters + 4 * _blocks(num_parameters, STATE_BLOCK)


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scales of an 8-bit state: (rows, blocks per row), or (blocks,) if blocks continue across rows.

    Scales by row are sharded like the rows themselves.
    """
    row = prod(shape[1:])
    return (_blocks(shape[0] * row, STATE_BLOCK),) if row % STATE_BLOCK else (shape[0], row // STATE_BLOCK)


def has_whole_blocks(shape: Sequence[int], num_shards: int) -> bool:
    """Whether each of ``num_shards`` shards of an 8-bit state has the same blocks as the whole state."""
    shard = -(-shape[0] // num_shards) * prod(shape[1:])
    return num_shards == 1 or prod(shape[1:]) % STATE_BLOCK == 0 or not (shape[0] % num_shards or shard % STATE_BLOCK)


def int8_bytes(out_features: int, in_features: int) -> int:
    """Bytes of a frozen int8 matrix, with one scale per row."""
    return out_features * in_features + 4 * out_features


def nf4_bytes(out_features: int, in_features: int) -> int:
    """Bytes of a frozen 4-bit NormalFloat matrix. Source: QLoRA (arXiv 2305.14314), section 3, with bf16 scales."""
    num_parameters = out_features * in_features
    return _blocks(num_parameters, 2) + 2 * _blocks(num_parameters, NF4_BLOCK)


FROZEN_FORMATS: dict[str, Callable[[int, int], int]] = {
    "int8": int8_bytes,
    "nf4": nf4_bytes,
}


def _blocks(num_elements: int, block: int) -> int:
    return -(-num_elements // block)


def step_bytes(bucket: int, piece: int, *, states: str, masters: str) -> int:
    """Workspace of AdamW; see ``steplm.optim.adamw.AdamW``.

    Args:
        bucket: elements that it updates at once.
        piece: elements of the largest tensor, or chunk of a tensor, in that bucket; rounding works on one at a time.
        masters: ``fp32`` (also for fp32 weights), ``8bit`` or ``none``.
    """
    update = 4 * bucket + (0 if masters == "fp32" else 4 * bucket)  # gradient and weight in fp32
    round_weights = {"fp32": 0, "8bit": 4 * bucket + 4 * piece, "none": 4 * bucket + 5 * piece}[masters]
    if states != "8bit":
        return max(update, round_weights)
    moments = 8 * bucket
    return moments + max(update, round_weights, 9 * piece)


def is_low_rank(rows: int, columns: int, rank: int) -> bool:
    """Whether a matrix of this shape can have states of this rank: it must be smaller than both sides."""
    return min(rows, columns) > rank


def low_rank_state_bytes(method: str, rows: int, columns: int, rank: int) -> int:
    """Bytes of one matrix's fp32 states, without master weights; see ``steplm.optim.low_rank.LowRankAdamW``.

    Two moments of shape (rank, larger side), and the projector of GaLore (arXiv 2403.03507, table 1) or the norm of
    APOLLO's last update (arXiv 2412.05270). APOLLO-Mini always has rank 1 and ignores ``rank``.
    """
    small, large = sorted((rows, columns))
    rank = 1 if method == "apollo_mini" else rank
    return 8 * rank * large + (4 * small * rank if method == "galore" else 4)


def low_rank_step_bytes(method: str, rows: int, columns: int, rank: int, *, width: int, has_master: bool) -> int:
    """Workspace of updating one such matrix, in a step that refreshes its projector.

    Excludes the workspace that LAPACK or cuSOLVER allocates internally.

    Args:
        width: bytes per element of the weight and its gradient: 2 or 4.
        has_master: whether a 2-byte weight has an fp32 master copy.
    """
    small, large = sorted((rows, columns))
    rank = 1 if method == "apollo_mini" else rank
    whole, projected, projector = 4 * small * large, 4 * rank * large, 4 * rank * small
    gradient = whole if width < 4 else 0
    weight = whole if width < 4 and not has_master else 0
    rounding = weight and weight + 5 * small * large  # random bits (4) and mask (1)
    if method == "galore":
        renewal = 16 * small * small + 8 * (small + 1)  # in fp64: the Gram matrix of the gradient, and eigenvectors
        return max(renewal, gradient + projected, 2 * projected + 4, projected + weight, rounding)
    num_factors = 1 if method == "apollo_mini" else large  # one for the matrix, or one per column
    factors = 9 * num_factors  # two norms (4), and mask (1)
    update = max(projector + projected, 2 * projected + factors, 8 * large, weight + 4 * num_factors)
    return max(gradient + update, rounding)


def unpack_bytes(fmt: str, num_parameters: int, width: int) -> int:
    """Bytes needed to dequantize one matrix to ``width`` bytes per parameter; see ``steplm.pet.packing``."""
    chunk = {"full": 0, "int8": 4, "nf4": 6}[fmt] * min(num_parameters, PACK_CHUNK)
    return 0 if fmt == "full" else num_parameters * width + chunk


def largest_bucket(sizes: Iterable[int]) -> int:
    """Elements of the largest bucket that the optimizer updates at once, for tensors of these sizes in this order.

    Tensors are split into chunks of at most ``STEP_CHUNK`` elements; a bucket is as many chunks as fit into that size.
    """
    largest = size = 0
    for num_elements in sizes:
        if num_elements >= STEP_CHUNK:
            return STEP_CHUNK
        size = num_elements if size + num_elements > STEP_CHUNK else size + num_elements
        largest = max(largest, size)
    return largest


NEWTON_SCHULZ_STEPS = 5  # per Muon update
SIGNED_CODE_BOOK_BYTES = CODE_BOOK_BYTES // 2  # lookup tables of a rule with 8-bit momentum, on each device


RowBlocks = Mapping[tuple[int, ...], tuple[int, ...]]  # rows and columns of a fused matrix -> rows of each map in it
NO_BLOCKS: RowBlocks = MappingProxyType({})


def maps_at_once(rows: int, columns: int) -> int:
    """How many matrices of this shape a matrix rule updates at once: at most ``STEP_CHUNK`` elements, or one matrix."""
    return max(1, STEP_CHUNK // (rows * columns))


def row_pieces(rows: int, columns: int) -> list[slice]:
    """Row ranges of a matrix whose momentum and weights are in fp32 at once.

    Each has at most ``STEP_CHUNK`` elements and starts at a block boundary of an 8-bit state. In matrices with more
    than ``STEP_CHUNK / STATE_BLOCK`` columns a range may be larger: the fewest rows that end at a block boundary.
    """
    size = _rows_of_piece(columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _rows_of_piece(columns: int) -> int:
    unit = STATE_BLOCK // gcd(columns, STATE_BLOCK)  # rows that fill whole blocks
    return max(unit, STEP_CHUNK // columns // unit * unit)


def momentum_bytes(rows: int, columns: int, states: str) -> int:
    """Bytes of the momentum of one matrix, in Muon and SCALE. Source of the 8-bit format: arXiv 2509.23106."""
    size = rows * columns
    return {"fp32": 4 * size, "bf16": 2 * size, "8bit": state_bytes(size)}[states]


def muon_step_bytes(
    maps: Iterable[tuple[int, int]],
    *,
    states: str,
    masters: str,
    compute_width: int,
    num_shards: int = 1,
    row_blocks: RowBlocks = NO_BLOCKS,
) -> int:
    """Workspace of a Muon update of weight matrices of these shapes.

    A step covers every matrix of the rule; a fused backward pass covers those of one parameter at a time. Excludes the
    workspace that matmul kernels allocate internally.

    Args:
        maps: rows and columns of every matrix, over all ranks.
        states: format of the momentum.
        masters: ``fp32`` (also for fp32 weights), ``8bit`` or ``none``.
        compute_width: bytes per element in Newton–Schulz: 2 on CUDA, 4 elsewhere.
        num_shards: ranks that share the rows of every matrix. Each rank gathers its share of the matrices.
        row_blocks: rows of the maps in a fused matrix, by its shape.
    """
    most = 0
    for batch, rows, columns, blocks in _muon_batches(maps, num_shards, row_blocks):
        updates = compute_width * batch * rows * columns
        pieces = _piece_bytes(rows // num_shards, columns, states=states, masters=masters)
        most = max(most, updates + pieces, _newton_schulz_bytes(batch, rows, columns, blocks, compute_width))
    return most


def muon_product_bytes(
    maps: Iterable[tuple[int, int]], *, compute_width: int, row_blocks: RowBlocks = NO_BLOCKS
) -> int:
    """The share of ``muon_step_bytes`` that Newton–Schulz needs."""
    return max((_newton_schulz_bytes(*batch, compute_width) for batch in _muon_batches(maps, 1, row_blocks)), default=0)


def _muon_batches(
    maps: Iterable[tuple[int, int]], num_shards: int, row_blocks: RowBlocks
) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """For each shape: matrices that a rank updates at once, rows (padded to ``num_shards``), columns, row blocks."""
    for (rows, columns), count in Counter(maps).items():
        whole = -(-rows // num_shards) * num_shards
        yield (
            -(-min(count, num_shards * maps_at_once(whole, columns)) // num_shards),
            whole,
            columns,
            row_blocks.get((rows, columns), ()),
        )


def _newton_schulz_bytes(batch: int, rows: int, columns: int, blocks: tuple[int, ...], compute_width: int) -> int:
    """Two copies of the matrices that are updated together, and one square Gram matrix for each.

    In fused matrices, these are of one row block at a time, in addition to the whole matrices.
    """
    largest = max(2 * n * columns + min(n, columns) ** 2 for n in blocks or (rows,))
    return compute_width * batch * (largest + (rows * columns if blocks else 0))


def scale_step_bytes(
    maps: Iterable[tuple[int, int]], *, states: str, masters: str, momentum: bool = False, norm: str = "column"
) -> int:
    """Workspace of a SCALE update of matrices of these shapes; arguments as in ``muon_step_bytes``."""
    most = 0
    for (rows, columns), count in Counter(maps).items():
        batch = min(count, maps_at_once(rows, columns))
        updates = 4 * batch * rows * columns
        pieces = _piece_bytes(rows, columns, states=states if momentum else None, masters=masters)
        norms = 4 * batch * {"column": rows, "row": columns, "both": max(rows, columns), "sign": 0}[norm]
        most = max(most, updates + max(pieces, norms))
    return most


def _piece_bytes(rows: int, columns: int, *, states: str | None, masters: str) -> int:
    """Workspace of reading and writing the momentum (None: there is none) or the weight of one chunk of a matrix."""
    # Momentum: its fp32 copy (4) plus the gradient's (4), or plus indices, boundaries and comparison (9).
    # Weight: its fp32 copy (4) plus the upper bits (4), or plus random bits (4) and mask (1).
    per_element = max(
        {None: 0, "fp32": 4, "bf16": 8, "8bit": 13}[states],
        {"fp32": 0, "8bit": 8, "none": 9}[masters],
    )
    return per_element * min(_rows_of_piece(columns), rows) * columns
