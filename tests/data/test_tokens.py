"""Token shards read back: what was written, wherever the shards end, and nothing that is damaged."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from steplm.data.shards import ShardWriter
from steplm.data.tokens import MANIFEST, Manifest, TokenDataset, verify
from steplm.errors import DataError

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [15]]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("shard_tokens", [1, 4, 7, 100])
def test_documents_come_back_whole_whatever_the_shard_size(
    make_dataset: Callable[..., TokenDataset], shard_tokens: int, dtype: str
) -> None:
    dataset = make_dataset(DOCUMENTS, shard_tokens, dtype)
    assert [dataset.document(number).tolist() for number in range(5)] == DOCUMENTS
    assert dataset.document_lengths.tolist() == [3, 1, 8, 2, 1]
    assert (dataset.num_tokens, dataset.num_documents, dataset.num_text_bytes) == (15, 5, 15)
    assert dataset.read(0, 1).dtype == np.dtype(dtype)


def test_every_range_of_tokens_is_read_across_shards(make_dataset: Callable[..., TokenDataset]) -> None:
    dataset = make_dataset(DOCUMENTS, shard_tokens=4)
    assert len(dataset.shards) > 2
    for start in range(16):
        for stop in range(start, 16):
            assert dataset.read(start, stop).tolist() == list(range(start + 1, stop + 1))
    for start, stop in [(-1, 2), (3, 2), (0, 16)]:
        with pytest.raises(IndexError):
            dataset.read(start, stop)


def test_tokens_above_16_bits_survive(make_dataset: Callable[..., TokenDataset]) -> None:
    assert make_dataset([[70_000, 2**32 - 1]], dtype="uint32").read(0, 2).tolist() == [70_000, 2**32 - 1]


def test_a_copy_for_another_process_is_small_and_equal(make_dataset: Callable[..., TokenDataset]) -> None:
    dataset = make_dataset([[number] * 50 for number in range(100)])
    dataset.read(0, 5000)
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert pickle.loads(data).read(0, 5000).tolist() == dataset.read(0, 5000).tolist()


@pytest.mark.parametrize("suffix", [".bin", ".offsets.npy"])
def test_a_missing_or_truncated_shard_is_named(make_dataset: Callable[..., TokenDataset], suffix: str) -> None:
    folder = make_dataset(DOCUMENTS, shard_tokens=4).prepared_dir
    file = folder / "train" / f"shard-00001{suffix}"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"shard-00001{suffix} has {len(whole) - 1} bytes, .* {len(whole)}"):
        TokenDataset(folder, "train")
    file.unlink()
    with pytest.raises(DataError, match=rf"shard-00001{suffix} is missing. Remove .* run 'steplm prepare' again"):
        TokenDataset(folder, "train")
    assert TokenDataset(folder, "validation").num_tokens == 15


@pytest.mark.parametrize(
    "name", ["train/shard-00000.bin", "validation/shard-00002.offsets.npy", "tokenizer/tokenizer.json"]
)
def test_verify_finds_a_changed_byte_in_any_file(make_dataset: Callable[..., TokenDataset], name: str) -> None:
    folder = make_dataset(DOCUMENTS, shard_tokens=4).prepared_dir
    assert verify(folder).split("train").num_tokens == 15
    file = folder / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DataError, match=Path(name).name):
        verify(folder)


def test_a_folder_that_is_not_prepared_says_how_to_prepare_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no finished token shards.*Run 'steplm prepare'"):
        TokenDataset(tmp_path, "train")


@pytest.mark.parametrize("data", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99}'])
def test_a_damaged_or_foreign_manifest_is_refused(tmp_path: Path, data: str) -> None:
    (tmp_path / "manifest.json").write_text(data)
    with pytest.raises(DataError, match=r"manifest\.json (is damaged|has version)"):
        Manifest.load(tmp_path)


def test_an_unknown_split_is_refused(make_dataset: Callable[..., TokenDataset]) -> None:
    folder = make_dataset(DOCUMENTS).prepared_dir
    with pytest.raises(DataError, match=r"no split 'test'. There are: train, validation"):
        TokenDataset(folder, "test")


def test_a_writer_takes_over_whole_shards_and_removes_the_rest(tmp_path: Path) -> None:
    def writer() -> ShardWriter:
        return ShardWriter(tmp_path, dtype="uint16", shard_tokens=3)

    first = writer()
    for position in range(4):
        first.append(position, np.array([position] * 2, "uint16"), 2)
    first.append(4, np.array([9], "uint16"), 1)  # in the third shard, which stays open
    first._file.flush()
    assert (tmp_path / "shard-00002.bin.unfinished").stat().st_size == 2
    again = writer()
    assert [shard.last_document for shard in again.shards] == [1, 3]
    assert (again.num_tokens, again.last_document) == (8, 3)
    assert not list(tmp_path.glob("*.unfinished"))
    (tmp_path / "shard-00001.bin").write_bytes(b"")
    assert [shard.last_document for shard in writer().shards] == [1]
    assert not list(tmp_path.glob("shard-00001*"))
    (tmp_path / "shard-00000.json").write_text("{")
    assert writer().shards == []
    assert list(tmp_path.iterdir()) == []


def test_shard_files_are_what_the_format_says(make_dataset: Callable[..., TokenDataset]) -> None:
    """Readable without this package: raw little-endian tokens, and a plain ``.npy`` file."""
    folder = make_dataset([[1, 2], [300]], shard_tokens=100).prepared_dir / "train"
    assert (folder / "shard-00000.bin").read_bytes() == b"\x01\x00\x02\x00\x2c\x01"
    offsets = np.load(folder / "shard-00000.offsets.npy", allow_pickle=False)
    assert (offsets.dtype, offsets.tolist()) == (np.dtype("<i8"), [0, 2, 3])
    assert json.loads((folder / "shard-00000.json").read_text())["num_documents"] == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda offsets: offsets[::-1],
        lambda offsets: offsets + 1,
        lambda offsets: offsets.astype(">i8"),
        lambda offsets: offsets.astype("<f8"),
        lambda offsets: offsets.reshape(1, -1),
        lambda offsets: np.where(offsets == offsets[1], 2**62, offsets),
    ],
)
def test_offsets_that_no_documents_have_are_refused(
    make_dataset: Callable[..., TokenDataset], spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    dataset = make_dataset([[1, 2, 3], [4, 5], [6, 7, 8]])
    file = dataset.prepared_dir / "train" / f"{dataset.shards[0].name}.offsets.npy"
    np.save(file, spoil(np.load(file)))
    with pytest.raises(DataError, match=r"offsets\.npy is damaged"):
        _ = dataset.document_offsets


def test_a_token_that_the_tokenizer_does_not_have_is_refused(make_dataset: Callable[..., TokenDataset]) -> None:
    dataset = make_dataset([[1, 2, 3], [4, 5]])
    manifest = dataset.prepared_dir / MANIFEST
    manifest.write_text(manifest.read_text().replace('"vocab_size": 65536', '"vocab_size": 5'))
    dataset = TokenDataset(dataset.prepared_dir, "train")
    assert dataset.read(0, 4).tolist() == [1, 2, 3, 4]
    with pytest.raises(DataError, match="token 5, and the tokenizer has 5"):
        dataset.read(0, 5)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"uint16"', '"O"'),
        ('"shard-00000"', '"../shard-00000"'),
        ('"num_tokens": 5', '"num_tokens": -5'),
        ('"num_documents": 2', '"num_documents": 0'),
        ('"num_records": 2', '"num_records": ' + "[" * 50_000),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_damaged(
    make_dataset: Callable[..., TokenDataset], was: str, becomes: str
) -> None:
    folder = make_dataset([[1, 2, 3], [4, 5]]).prepared_dir
    text = (folder / MANIFEST).read_text()
    assert was in text
    (folder / MANIFEST).write_text(text.replace(was, becomes))
    with pytest.raises(DataError, match=r"manifest\.json is damaged") as caught:
        TokenDataset(folder, "train")
    assert len(str(caught.value).splitlines()) == 1
