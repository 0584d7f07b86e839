import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from steplm.cost.count import ByteCounter
from steplm.cost.formats import FROZEN_FORMATS, NF4_BLOCK
from steplm.pet import packing
from steplm.pet.packing import CODES, FORMATS, NF4_LEVELS, SCALES

SHAPES = [(1, 1), (1, 63), (3, 5), (7, 64), (5, 77), (32, 48), (2, 129)]
DTYPES = [torch.float32, torch.bfloat16]

PUBLISHED_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def restored(name: str, weight: torch.Tensor) -> torch.Tensor:
    return FORMATS[name].unpack(FORMATS[name].pack(weight), tuple(weight.shape), weight.dtype)


def test_the_levels_of_nf4_are_the_published_ones():
    assert list(NF4_LEVELS) == pytest.approx(list(PUBLISHED_NF4), abs=1e-6)
    assert {NF4_LEVELS[0], NF4_LEVELS[7], NF4_LEVELS[15]} == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("name", FORMATS)
def test_packed_bytes_and_parts_are_the_promised_ones(name):
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        packed = FORMATS[name].pack(matrix(shape, dtype))
        found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in packed.items()}
        assert found == FORMATS[name].parts(shape, dtype)
        promised = FROZEN_FORMATS[name](*shape) if name in FROZEN_FORMATS else shape[0] * shape[1] * dtype.itemsize
        assert sum(tensor.nbytes for tensor in packed.values()) == promised
        assert sum(tensor.untyped_storage().nbytes() for tensor in packed.values()) == promised


def test_int8_of_a_known_matrix():
    weight = torch.tensor([[127.0, -254.0, 1.0], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.1]])
    packed = FORMATS["int8"].pack(weight)
    assert packed[CODES].tolist() == [[64, -127, 0], [0, 0, 0], [-127, 64, 25]]  # 63.5 to the even neighbor
    assert packed[SCALES].tolist() == pytest.approx([2.0, 0.0, 0.5 / 127])
    expected = torch.tensor([[128.0, -254.0, 0.0], [0.0] * 3, [-0.5, 64 * 0.5 / 127, 25 * 0.5 / 127]])
    torch.testing.assert_close(restored("int8", weight), expected)


def test_int8_errs_by_at_most_half_a_step():
    weight = matrix((33, 70))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((restored("int8", weight) - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_takes_the_nearest_level_of_the_rounded_scale(dtype):
    weight = matrix((5, 77), dtype)
    weight[0, :64] = 0
    packed = FORMATS["nf4"].pack(weight)
    nibbles = torch.stack((packed[CODES] // 16, packed[CODES] % 16), 1).flatten()[: weight.numel()]
    for start in range(0, weight.numel(), NF4_BLOCK):
        block = weight.flatten()[start : start + NF4_BLOCK].double()
        scale = packed[SCALES][start // NF4_BLOCK]
        assert scale == block.abs().max().bfloat16()
        distances = (block[:, None] - scale.double() * torch.tensor(NF4_LEVELS).double()).abs()
        chosen = distances.gather(1, nibbles[start : start + NF4_BLOCK, None].long())[:, 0]
        assert (chosen <= distances.amin(1) + 1e-7 * scale.double()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_rounds_the_product_of_code_and_scale_once(shape, dtype):
    int8, nf4 = (FORMATS[name].pack(matrix(shape, dtype)) for name in ("int8", "nf4"))
    expected = (int8[CODES].float() * int8[SCALES][:, None]).to(dtype)
    assert torch.equal(FORMATS["int8"].unpack(int8, shape, dtype), expected)
    nibbles = torch.stack((nf4[CODES] // 16, nf4[CODES] % 16), 1).flatten()[: shape[0] * shape[1]]
    scales = nf4[SCALES].float().repeat_interleave(NF4_BLOCK)[: nibbles.numel()]
    expected = (torch.tensor(NF4_LEVELS)[nibbles.long()] * scales).to(dtype).view(shape)
    assert torch.equal(FORMATS["nf4"].unpack(nf4, shape, dtype), expected)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_chunks_change_nothing(name, monkeypatch):
    for shape in SHAPES:
        weight = matrix(shape, torch.bfloat16)
        packed, whole = FORMATS[name].pack(weight), restored(name, weight)
        monkeypatch.setattr(packing, "PACK_CHUNK", 128)
        assert all(torch.equal(tensor, packed[key]) for key, tensor in FORMATS[name].pack(weight).items())
        assert torch.equal(restored(name, weight), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_an_unpacked_matrix_again_changes_nothing(name, dtype):
    """So that codes follow from the plain weights of a checkpoint."""
    for scale in (1e-6, 0.02, 30.0):
        weight = matrix((150, 77), dtype, scale)
        first = FORMATS[name].pack(weight)
        again = FORMATS[name].pack(FORMATS[name].unpack(first, (150, 77), dtype))
        assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


def test_the_scale_of_int8_survives_being_unpacked_for_every_mantissa():
    for dtype, bits in (
        (torch.bfloat16, torch.arange(2**7, dtype=torch.int16) + 0x3F80),
        (torch.float32, torch.arange(0, 2**23, 97, dtype=torch.int32) + 0x3F800000),
    ):
        largest = bits.view(dtype)
        scales = largest.float() / 127
        assert torch.equal((127 * scales).to(dtype).float() / 127, scales)


@pytest.mark.parametrize(("name", "expected"), [("int8", 0.0073), ("nf4", 0.0910)])
def test_relative_error_of_normal_weights(name, expected):
    """A golden number for each format, of 512 columns of normal weights."""
    weight = matrix((64, 512))
    error = (restored(name, weight) - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert error.item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_of_zeros_stays_one(name):
    assert not restored(name, torch.zeros(3, 70)).any()


@pytest.mark.parametrize("name", FORMATS)
def test_formats_work_on_fake_tensors_before_and_after_real_ones(name):
    def on_fakes() -> None:
        with FakeTensorMode():
            weight = torch.empty(5, 77, dtype=torch.bfloat16)
            result = restored(name, weight)
            assert (result.shape, result.dtype) == (weight.shape, weight.dtype)

    packing._pair_table.cache_clear()
    on_fakes()
    assert restored(name, matrix((5, 77))).any()
    on_fakes()


@pytest.mark.parametrize(("name", "chunk_bytes"), [("full", 0), ("int8", 4), ("nf4", 6)])
def test_unpacking_takes_the_bytes_of_the_matrix_and_of_one_chunk(name, chunk_bytes, monkeypatch):
    """A chunk is fp32, and nf4 looks it up with an int32 for every two elements."""
    monkeypatch.setattr(packing, "PACK_CHUNK", 256)
    packed = FORMATS[name].pack(matrix((12, 64), torch.bfloat16))
    FORMATS[name].unpack(packed, (12, 64), torch.bfloat16)  # the table is made once
    with ByteCounter() as counter:
        weight = FORMATS[name].unpack(packed, (12, 64), torch.bfloat16)
    assert counter.current_bytes == (0 if name == "full" else weight.nbytes)
    assert counter.peak_bytes == counter.current_bytes + chunk_bytes * 256
