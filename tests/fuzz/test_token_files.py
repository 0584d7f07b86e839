"""A folder of prepared tokens in which a file is not what was written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steplm.config import RunConfig
from steplm.data import prepare as prepare_module
from steplm.data.loader import BatchLoader, validation_windows
from steplm.data.prepare import PrepareProgress, prepare
from steplm.data.tokens import MANIFEST, Manifest, TokenDataset, verify
from steplm.errors import DataError

fuzz = settings.get_profile("fuzz")
Claim = Callable[..., AbstractContextManager[None]]
Fresh = Callable[[], AbstractContextManager[Path]]
SpoilFile = Callable[[st.DataObject, Path], None]
Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def prepared(tiny_run: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder with several shards."""
    config = tiny_run(tmp_path_factory.mktemp("run"), "data.shard_tokens=2000")
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare(_in(config, folder))
    return folder


def _in(config: RunConfig, folder: Path) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"prepared_dir": str(folder)})})


def _files(folder: Path, *patterns: str) -> list[Path]:
    return sorted(file.relative_to(folder) for pattern in patterns for file in folder.rglob(pattern))


def read_all(folder: Path) -> None:
    """What a run does with its data."""
    for split in ("train", "validation"):
        dataset = TokenDataset(folder, split)
        loader = BatchLoader(dataset, seed=0, sequence_length=16, within_documents=True)
        for tokens_seen in (0, 64, 16 * loader.sources[0].per_epoch):
            assert int(loader.batch(tokens_seen, 4).input_ids.max()) < dataset.manifest.tokenizer.vocab_size
        for batch in validation_windows(dataset, 16, 256, batch_size=4):
            assert batch.input_ids.shape[1] == 16


@fuzz
@given(data=st.data())
def test_a_run_reads_spoiled_tokens_or_refuses_them(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, prepared: Path, spoil_file: SpoilFile
) -> None:
    file = data.draw(st.sampled_from(_files(prepared, MANIFEST, "*.bin", "*.npy")), label="file")
    with fresh_folder() as parent:
        folder = shutil.copytree(prepared, parent / "tokens")
        spoil_file(data, folder / file)
        with claim():
            read_all(folder)
        with claim():
            verify(folder)


@fuzz
@given(data=st.data())
def test_a_manifest_of_spoiled_values_is_read_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, prepared: Path, spoil_file: SpoilFile
) -> None:
    with fresh_folder() as parent:
        folder = shutil.copytree(prepared, parent / "tokens")
        spoil_file(data, folder / MANIFEST)
        with claim():
            read_all(folder)
        with claim():
            Manifest.load(folder)


@fuzz
@given(data=st.data())
def test_a_spoiled_shard_is_always_found_by_its_hash(
    data: st.DataObject, fresh_folder: Fresh, prepared: Path, spoil_bytes: Callable[[st.DataObject, bytes], bytes]
) -> None:
    file = data.draw(st.sampled_from(_files(prepared, "*.bin", "*.npy", "tokenizer.json")), label="file")
    content = spoil_bytes(data, (prepared / file).read_bytes())
    if content == (prepared / file).read_bytes():
        return
    with fresh_folder() as parent:
        folder = shutil.copytree(prepared, parent / "tokens")
        (folder / file).write_bytes(content)
        with pytest.raises(DataError, match=file.name):
            verify(folder)


@fuzz
@given(data=st.data())
def test_a_preparation_goes_on_from_spoiled_work_or_refuses_it(
    data: st.DataObject,
    claim: Claim,
    fresh_folder: Fresh,
    prepared: Path,
    tiny_run: Configure,
    spoil_file: SpoilFile,
) -> None:
    patterns = ("shard-*.json", "inputs.json", "tokenizer*.json", MANIFEST)
    file = data.draw(st.sampled_from(_files(prepared, *patterns)), label="file")
    with fresh_folder() as parent:
        folder = shutil.copytree(prepared, parent / "tokens")
        spoil_file(data, folder / file)
        if file.name != MANIFEST and data.draw(st.booleans(), label="unfinished"):
            (folder / MANIFEST).unlink()
        with claim(folder):
            prepare(_in(tiny_run(parent / "run", "data.shard_tokens=2000"), folder))
            read_all(folder)


@pytest.fixture(scope="module")
def unfinished(tiny_run: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a preparation stopped in its midst."""
    config = tiny_run(tmp_path_factory.mktemp("run"), "data.shard_tokens=2000")
    folder = tmp_path_factory.mktemp("unfinished") / "tokens"

    def stop(progress: PrepareProgress) -> None:
        if progress.num_train_tokens > 5000:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "SAVE_SECONDS", 0.0)
        patch.setattr(prepare_module, "BATCH_BYTES", 500)
        with pytest.raises(KeyboardInterrupt):
            prepare(_in(config, folder), stop)
    assert (folder / "unfinished.json").is_file()
    return folder


@fuzz
@given(data=st.data())
def test_an_interrupted_preparation_goes_on_from_spoiled_work_or_begins_anew(
    data: st.DataObject,
    claim: Claim,
    fresh_folder: Fresh,
    unfinished: Path,
    tiny_run: Configure,
    spoil_file: SpoilFile,
) -> None:
    patterns = ("unfinished.json", "documents.hashes", "shard-*")
    file = data.draw(st.sampled_from(_files(unfinished, *patterns)), label="file")
    with fresh_folder() as parent:
        folder = shutil.copytree(unfinished, parent / "tokens")
        spoil_file(data, folder / file)
        with claim(folder):
            prepare(_in(tiny_run(parent / "run", "data.shard_tokens=2000"), folder))
            read_all(folder)


@pytest.mark.parametrize("dtype", ["<i8", ">u2", "<f4", "O"])
def test_offsets_of_another_type_are_refused(dtype: str, claim: Claim, prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "tokens")
    file = folder / "train" / "shard-00000.offsets.npy"
    offsets = np.load(file)
    np.save(file, (offsets + 1).astype(dtype), allow_pickle=True)
    with claim():
        read_all(folder)


def test_fuzzed_json_types_do_not_reach_numpy(prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "tokens")
    text: Any = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"uint16"', '"O"'))
    with pytest.raises(DataError, match="dtype"):
        TokenDataset(folder, "train")
