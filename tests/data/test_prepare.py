"""Preparation: nothing lost, nothing twice, the same bytes every time, and a clear word where it fails."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steplm import files
from steplm.config import RunConfig, dump_config
from steplm.data import prepare as prepare_module
from steplm.data import shards
from steplm.data.prepare import PrepareProgress, _changes, prepare
from steplm.data.shards import ShardWriter
from steplm.data.tokenizer import load_tokenizer
from steplm.data.tokens import Manifest, TokenDataset, verify
from steplm.errors import ConfigError, DataError

Configure = Callable[..., RunConfig]
Jsonl = Callable[..., Path]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 500)


def documents(config: RunConfig, split: str) -> list[str]:
    dataset, tokenizer = (
        TokenDataset(config.prepared_dir, split),
        load_tokenizer(config.prepared_dir / "tokenizer"),
    )
    tokens = [dataset.document(number).tolist() for number in range(dataset.num_documents)]
    assert all(document[-1] == tokenizer.eos_token_id for document in tokens)
    return [tokenizer.decode(document[:-1], clean_up_tokenization_spaces=False) for document in tokens]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_text_comes_back_in_order_in_exactly_one_split(
    configure: Configure, jsonl: Jsonl, texts: list[str]
) -> None:
    config = configure(train=str(jsonl(texts)), shard_tokens=700)
    manifest = prepare(config)
    train, validation = documents(config, "train"), documents(config, "validation")
    assert len(validation) > 0
    assert sorted(train + validation) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train
    assert len(manifest.split("train").shards) > 2
    text_bytes = sum(len(text.encode()) for text in train)
    assert (
        manifest.split("train").num_text_bytes
        == TokenDataset(config.prepared_dir, "train").num_text_bytes
        == text_bytes
    )
    assert verify(config.prepared_dir) == manifest == Manifest.load(config.prepared_dir)
    assert manifest.dtype == "uint16"


def test_tokens_are_those_of_the_plain_tokenizer(configure: Configure, jsonl: Jsonl, texts: list[str]) -> None:
    config = configure(train=str(jsonl(texts)))
    prepare(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    train = documents(config, "train")
    expected = [token for text in train for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    dataset = TokenDataset(config.prepared_dir, "train")
    assert dataset.read(0, dataset.num_tokens).tolist() == expected


def test_text_that_spells_a_special_token_does_not_become_one(
    configure: Configure, jsonl: Jsonl, texts: list[str]
) -> None:
    tricky = "before<|endoftext|>after"
    config = configure(train=str(jsonl([tricky])), validation=str(jsonl(texts, "validation.jsonl")))
    prepare(config)
    tokens = TokenDataset(config.prepared_dir, "train").document(0).tolist()
    end = load_tokenizer(config.prepared_dir / "tokenizer").eos_token_id
    assert tokens.count(end) == 1
    assert documents(config, "train") == [tricky]


def test_the_number_of_workers_changes_no_byte(
    configure: Configure, jsonl: Jsonl, texts: list[str], tmp_path: Path
) -> None:
    def result(num_workers: int) -> dict[str, bytes]:
        config = configure(
            train=[str(source)],
            shard_tokens=300,
            max_train_tokens=2500,
            max_bad_share=0.5,
            num_workers=num_workers,
            prepared_dir=str(tmp_path / f"workers_{num_workers}"),
        )
        prepare(config)
        return contents(config.prepared_dir)

    source = jsonl([line for text in texts for line in (text, "")])  # every second record is bad
    assert result(1) == result(2) == result(7)


def test_duplicates_are_dropped_and_training_copies_of_validation_text_too(
    configure: Configure, jsonl: Jsonl, texts: list[str]
) -> None:
    config = configure(
        train=str(jsonl([*texts[:20], *texts[:5], *texts[10:30]])),
        validation=str(jsonl(texts[18:22], "validation.jsonl")),
    )
    manifest = prepare(config)
    assert documents(config, "validation") == texts[18:22]
    assert documents(config, "train") == texts[:18] + texts[22:30]
    assert (manifest.num_records, manifest.num_duplicates) == (49, 49 - 4 - 26)


def test_the_split_depends_on_the_text_alone(
    configure: Configure, jsonl: Jsonl, texts: list[str], tmp_path: Path
) -> None:
    def validation(order: list[str], name: str) -> set[str]:
        config = configure(train=str(jsonl(order, f"{name}.jsonl")), prepared_dir=str(tmp_path / name))
        prepare(config)
        return set(documents(config, "validation"))

    forward = validation(texts, "forward")
    assert validation(texts[::-1], "backward") == forward
    assert 1 <= len(forward) <= 15


def test_preparing_stops_at_the_document_that_reaches_the_limit(
    configure: Configure, jsonl: Jsonl, texts: list[str]
) -> None:
    config = configure(train=str(jsonl(texts)), max_train_tokens=2000)
    manifest = prepare(config)
    dataset = TokenDataset(config.prepared_dir, "train")
    assert manifest.split("train").num_tokens >= 2000
    assert manifest.split("train").num_tokens - dataset.document_lengths[-1] < 2000
    assert manifest.num_records < len(texts)


# Interruption.


@pytest.mark.parametrize("max_train_tokens", [None, 2500])
@pytest.mark.parametrize("num_closed", [0, 1, 2, 4, 6, 100])
def test_interrupted_and_started_again_equals_unbroken(
    configure: Configure,
    jsonl: Jsonl,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_closed: int,
    max_train_tokens: int | None,
) -> None:
    """Interrupted as the shard after ``num_closed`` is closed; 100: after the last, before the manifest."""
    common = {
        "train": [str(jsonl([*texts, "", texts[0]]))],
        "shard_tokens": 400,
        "max_bad_share": 0.1,
        "max_train_tokens": max_train_tokens,
        "tokenizer": "train",
    }
    unbroken, broken = (configure(**common, prepared_dir=str(tmp_path / name)) for name in ("unbroken", "broken"))
    prepare(unbroken)

    close, calls = ShardWriter.close, []

    def interrupted(writer: ShardWriter) -> None:
        if writer._file is not None:
            calls.append(1)
            if len(calls) > num_closed:
                raise KeyboardInterrupt
        close(writer)

    def no_manifest(path: Path, value: object) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        shards.write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", interrupted)
        patch.setattr(prepare_module, "write_json", no_manifest)
        with pytest.raises(KeyboardInterrupt):
            prepare(broken)
    assert not (broken.prepared_dir / "manifest.json").exists()
    seen: list[PrepareProgress] = []
    prepare(broken, seen.append)
    assert (seen[-1].num_reused_tokens > 0) == (num_closed > 0)
    assert contents(broken.prepared_dir) == contents(unbroken.prepared_dir)


def test_killed_and_started_again_equals_unbroken(
    configure: Configure, jsonl: Jsonl, texts: list[str], tmp_path: Path
) -> None:
    generator = random.Random(0)
    many = [" ".join(generator.choices(texts, k=20)) for _ in range(1500)]
    source = jsonl(many)
    unbroken, killed = (
        configure(train=str(source), shard_tokens=30_000, prepared_dir=str(tmp_path / name))
        for name in ("unbroken", "killed")
    )
    prepare(unbroken)
    (tmp_path / "run.yaml").write_text(dump_config(killed))
    code = (
        "import sys; from steplm.config import load_config; from steplm.data.prepare import prepare; "
        "prepare(load_config(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run.yaml")])
    try:
        deadline = time.monotonic() + 60
        while not (killed.prepared_dir / "unfinished.json").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (killed.prepared_dir / "manifest.json").exists()
    seen: list[PrepareProgress] = []
    prepare(killed, seen.append)
    assert seen[0].num_reused_tokens >= 30_000
    assert contents(killed.prepared_dir) == contents(unbroken.prepared_dir)


@pytest.fixture
def sharded_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> Callable[[], Counter[int]]:
    """A data set of five shards behind ``hub://owner/name``; returns how many records of each were read so far."""
    datasets = pytest.importorskip("datasets")
    for number in range(5):
        rows = [{"text": text} for text in [*texts[number * 12 : number * 12 + 12], "", texts[0]]]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"hub-{number}.parquet")
    files = [str(tmp_path / f"hub-{number}.parquet") for number in range(5)]
    load, read = datasets.load_dataset, Counter[int]()

    class Stream:
        """``datasets`` over local files, counting."""

        num_shards = 5

        def __init__(self, stream: Any, index: int) -> None:
            self.stream, self.index = stream, index

        def shard(self, num_shards: int, index: int) -> Stream:
            return Stream(self.stream.shard(num_shards=num_shards, index=index), index)

        def skip(self, num_records: int) -> Stream:
            return Stream(self.stream.skip(num_records), self.index)

        def __iter__(self) -> Iterator[Any]:
            for record in self.stream:
                read[self.index] += 1
                yield record

    def load_dataset(name: str, streaming: bool, split: str) -> Stream:
        return Stream(load("parquet", data_files={split: files}, split=split, streaming=True), 0)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return lambda: read


def test_interrupted_at_many_instants_a_stream_goes_on_where_it_stood(
    configure: Configure,
    sharded_hub: Callable[[], Counter[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = {"train": "hub://owner/name", "shard_tokens": 400, "max_bad_share": 0.2}
    unbroken, broken = (configure(**common, prepared_dir=str(tmp_path / name)) for name in ("unbroken", "broken"))
    manifest = prepare(unbroken)
    assert (manifest.num_records, manifest.num_bad_records, manifest.num_duplicates) == (70, 5, 5)
    assert manifest.bad_records[0].origin == "hub://owner/name:0:13"
    read_unbroken = sharded_hub().total()
    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", 0.0)
    append, generator = ShardWriter.append, random.Random(0)
    calls = {"left": 0, "interruptions": 0}

    def interrupted(writer: ShardWriter, *args: Any) -> None:
        calls["left"] -= 1
        if calls["left"] == 0:
            calls["interruptions"] += 1
            raise KeyboardInterrupt
        append(writer, *args)

    monkeypatch.setattr(ShardWriter, "append", interrupted)
    while not (broken.prepared_dir / "manifest.json").exists():
        calls["left"] = generator.randint(1, 7)
        with contextlib.suppress(KeyboardInterrupt):
            prepare(broken)
    assert calls["interruptions"] >= 15
    assert contents(broken.prepared_dir) == contents(unbroken.prepared_dir)
    # Each interruption loses what is on its way, a few batches, and never begins at the front.
    read_broken = sharded_hub().total() - read_unbroken
    assert read_broken < read_unbroken + 20 * calls["interruptions"]


@pytest.mark.parametrize(
    "damage", ["unfinished.json", "documents.hashes", "shard-00001.json", "shard-*.bin.unfinished"]
)
def test_unfinished_work_that_is_damaged_is_begun_anew(
    configure: Configure, jsonl: Jsonl, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    common = {"train": str(jsonl(texts)), "shard_tokens": 400}
    unbroken, broken = (configure(**common, prepared_dir=str(tmp_path / name)) for name in ("unbroken", "broken"))
    prepare(unbroken)
    append, calls = ShardWriter.append, []

    def interrupted(writer: ShardWriter, *args: Any) -> None:
        calls.append(writer)
        if len(calls) == 37:
            raise KeyboardInterrupt
        append(writer, *args)

    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(broken)
    (file,) = (file for file in broken.prepared_dir.rglob(damage) if "train" in file.parts or "shard" not in damage)
    file.write_bytes(file.read_bytes()[:5])
    seen: list[PrepareProgress] = []
    prepare(broken, seen.append)
    assert seen[0].num_reused_tokens == 0
    assert contents(broken.prepared_dir) == contents(unbroken.prepared_dir)


def test_a_data_set_on_the_hub_is_read_at_one_commit_though_it_changes(
    configure: Configure, sharded_hub: Callable[[], Counter[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    commits, load, revisions = iter(["a" * 40, "b" * 40]), datasets.load_dataset, []

    def load_dataset(name: str, revision: str, **arguments: Any) -> Any:
        revisions.append(revision)
        return load(name, **arguments)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    info = SimpleNamespace(dataset_info=lambda *args, **kwargs: SimpleNamespace(sha=next(commits)))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: info)
    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", 0.0)
    config = configure(train="hub://owner/name", max_bad_share=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_check_not_empty", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    prepare(config)
    assert set(revisions) == {"a" * 40}
    assert len(revisions) > 1


def test_finished_work_is_returned_at_once(
    configure: Configure, jsonl: Jsonl, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(train=str(jsonl(texts)))
    manifest = prepare(config)
    monkeypatch.setattr(prepare_module, "load_tokenizer", None)
    monkeypatch.setattr(prepare_module, "_write_shards", None)
    assert prepare(config) == manifest
    more_workers = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 3})})
    assert prepare(more_workers) == manifest


def test_finished_work_with_a_missing_shard_is_not_taken_for_whole(
    configure: Configure, jsonl: Jsonl, texts: list[str]
) -> None:
    config = configure(train=str(jsonl(texts)))
    prepare(config)
    (config.prepared_dir / "train" / "shard-00000.bin").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.bin is missing"):
        prepare(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_field": "content"}, "data.text_field: was text, is content"),
        ({"shard_tokens": 99}, "data.shard_tokens: was 32000000, is 99"),
        ({"max_train_tokens": 10}, "data.max_train_tokens: was not set, is 10"),
        ({"validation_fraction": 0.2}, "data.validation_fraction: was 0.1, is 0.2"),
        ({"tokenizer": "train"}, "data.tokenizer: was "),
        ({"train": "builtin://python-docs"}, "data.train: was "),
        ({"validation": "builtin://python-docs"}, "data.validation: was "),
    ],
)
def test_other_options_never_get_the_finished_shards(
    configure: Configure, jsonl: Jsonl, texts: list[str], change: dict[str, object], named: str
) -> None:
    source = {"train": str(jsonl(texts))}
    prepare(configure(**source))
    with pytest.raises(DataError, match="tokens of other inputs") as caught:
        prepare(configure(**{**source, **change}))
    assert named in str(caught.value)


def test_a_changed_file_or_tokenizer_is_noticed(
    configure: Configure, jsonl: Jsonl, texts: list[str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    load_tokenizer(tokenizer_dir).save_pretrained(tokenizer)
    config = configure(train=str(jsonl(texts)), tokenizer=str(tokenizer))
    prepare(config)
    file = tokenizer / "tokenizer.json"
    original = file.read_text()
    file.write_text(original + "\n")
    with pytest.raises(DataError, match="tokenizer files"):
        prepare(config)
    file.write_text(original)
    prepare(config)
    jsonl([*texts, "one more"])
    with pytest.raises(DataError, match=r"data\.train: was .*bytes, ends"):
        prepare(config)


def test_unfinished_work_of_other_options_is_discarded(
    configure: Configure, jsonl: Jsonl, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(jsonl(texts))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_check_not_empty", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(configure(train=source, shard_tokens=100, tokenizer="train"))
    assert (tmp_path / "prepared" / "train" / "shard-00005.json").exists()
    prepare(configure(train=source, shard_tokens=1000))
    fresh = configure(train=source, shard_tokens=1000, prepared_dir=str(tmp_path / "fresh"))
    prepare(fresh)
    assert contents(tmp_path / "prepared") == contents(fresh.prepared_dir)


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


# Bad input.


def test_bad_records_are_counted_and_shown_in_the_manifest(
    configure: Configure, jsonl: Jsonl, texts: list[str]
) -> None:
    source = jsonl(texts)
    with source.open("a") as stream:
        stream.write('{"text": "cut off')
    manifest = prepare(configure(train=str(source), max_bad_share=0.02))
    assert (manifest.num_records, manifest.num_bad_records) == (61, 1)
    assert manifest.bad_records[0].origin == f"{source}:61"


def test_too_many_bad_records_stop_the_run_and_show_the_first(
    configure: Configure, jsonl: Jsonl, texts: list[str]
) -> None:
    config = configure(train=str(jsonl([*texts, ""])))
    with pytest.raises(DataError, match=r"1 of 61 records \(1\.64%\) are unusable.*\n.*:61: field 'text' is empty"):
        prepare(config)
    assert not (config.prepared_dir / "manifest.json").exists()


def test_too_many_bad_records_stop_a_long_run_early(configure: Configure, jsonl: Jsonl, texts: list[str]) -> None:
    many = [f"{number} {text}" for number in range(50) for text in texts]
    config = configure(train=str(jsonl([""] * 30 + many)))
    with pytest.raises(DataError, match="30 of 1,") as caught:
        prepare(config)
    assert caught.value.num_records < 1100


def test_the_order_of_a_few_bad_records_does_not_matter(configure: Configure, jsonl: Jsonl, texts: list[str]) -> None:
    many = [f"{number} {text}" for number in range(50) for text in texts]
    manifest = prepare(configure(train=str(jsonl(["", "", *many]))))
    assert (manifest.num_bad_records, manifest.num_records) == (2, len(many) + 2)


def test_a_wrong_text_field_names_the_fields_there_are(configure: Configure, jsonl: Jsonl, texts: list[str]) -> None:
    once = r"100.00%.*\n.*:1: no field 'content'; fields are 'text' \(and 59 more like it\)\nFix"
    with pytest.raises(DataError, match=once):
        prepare(configure(train=str(jsonl(texts)), text_field="content"))


def test_a_truncated_gzip_is_reported_and_the_rest_is_prepared(
    configure: Configure, jsonl: Jsonl, texts: list[str]
) -> None:
    generator = random.Random(0)
    noise = ["".join(generator.choices("abcdefgh ", k=300)) for _ in range(600)]
    path = jsonl(noise, "noise.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-3000])
    manifest = prepare(configure(train=[str(path), str(jsonl(texts))], max_bad_share=0.01))
    assert manifest.num_bad_records == 1
    assert "truncated .gz" in manifest.bad_records[0].reason
    assert sum(split.num_documents for split in manifest.splits.values()) > 500


def test_no_text_named_is_an_error_of_the_configuration(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is empty.*builtin://python-docs"):
        prepare(configure())


def test_a_corpus_too_small_to_split_says_what_to_do(configure: Configure, jsonl: Jsonl) -> None:
    with pytest.raises(DataError, match=r"no validation text: 1 training.*raise data\.validation_fraction=0\.0001"):
        prepare(configure(train=str(jsonl(["alone"])), validation_fraction=0.0001))
    with pytest.raises(DataError, match=r"no training text: 0 training and 1 validation"):
        prepare(configure(train=str(jsonl(["alone"])), validation=str(jsonl(["alone"], "validation.jsonl"))))


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers(
    configure: Configure, jsonl: Jsonl, texts: list[str]
) -> None:
    source = str(jsonl(texts))
    with pytest.raises(ConfigError, match=r"has 300 tokens, more than model.vocab_size=299") as caught:
        prepare(configure(vocab_size=299, train=source))
    assert (caught.value.vocab_size, caught.value.model_vocab_size) == (300, 299)
    prepare(configure(train=source))
    with pytest.raises(ConfigError, match=r"more than model.vocab_size=299"):
        prepare(configure(vocab_size=299, train=source))


def test_a_trained_tokenizer_has_the_models_vocabulary_and_has_not_seen_validation_text(
    configure: Configure, jsonl: Jsonl, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample: list[str] = []
    train_tokenizer = prepare_module.train_tokenizer

    def spy(stream: object, vocab_size: int) -> object:
        sample.extend(stream)
        return train_tokenizer(sample, vocab_size)

    monkeypatch.setattr(prepare_module, "train_tokenizer", spy)
    config = configure(vocab_size=333, train=str(jsonl(texts)), tokenizer="train")
    manifest = prepare(config)
    assert manifest.tokenizer.vocab_size == 333
    assert sample == documents(config, "train")


def test_each_source_gives_its_share_to_the_tokenizer(
    configure: Configure, jsonl: Jsonl, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "TOKENIZER_SAMPLE_BYTES", 2000)
    sample: list[str] = []

    def stop(stream: object, vocab_size: int) -> None:
        sample.extend(stream)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "train_tokenizer", stop)
    sources = [str(jsonl(texts[:30], "first.jsonl")), str(jsonl(texts[30:], "second.jsonl"))]
    with pytest.raises(KeyboardInterrupt):
        prepare(configure(train=sources, tokenizer="train"))
    for part in (texts[:30], texts[30:]):
        num_bytes = sum(len(text.encode()) for text in sample if text in part)
        assert 1000 <= num_bytes < 2000


@pytest.mark.parametrize("failing", ["shard-00001.bin", "shard-00001.json", "manifest.json"])
def test_a_full_disk_is_explained_and_leaves_nothing_half_written(
    configure: Configure,
    jsonl: Jsonl,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    common = {"train": str(jsonl(texts)), "shard_tokens": 500}
    full, roomy = (configure(**common, prepared_dir=str(tmp_path / name)) for name in ("full", "roomy"))
    prepare(roomy)

    def full_disk(sync: Callable[[Any], None]) -> Callable[[Any], None]:
        def failing_sync(file: Any) -> None:
            if failing in str(file) and "full" in str(file):
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(file)

        return failing_sync

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_sync", full_disk(shards._sync))
        patch.setattr(files, "sync", full_disk(files.sync))
        with pytest.raises(DataError, match=r"No space left on device \(.* free\).*data\.prepared_dir to another disk"):
            prepare(full)
    assert not (full.prepared_dir / "manifest.json").exists()
    with pytest.raises(DataError, match="no finished token shards"):
        TokenDataset(full.prepared_dir, "train")
    prepare(full)
    assert contents(full.prepared_dir) == contents(roomy.prepared_dir)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full_is_explained(
    configure: Configure, jsonl: Jsonl, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(train=str(jsonl(texts)))
    folder = config.prepared_dir / "train"
    opened = Path.open

    def open_full(path: Path, *args: object, **kwargs: object) -> object:
        return opened(Path("/dev/full") if path.parent == folder and "bin" in path.name else path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(config)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space for a file")
def test_a_disk_without_room_for_what_was_seen_is_explained(
    configure: Configure, jsonl: Jsonl, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(configure(train=str(jsonl(texts))))


def test_progress_rises_and_ends_with_the_totals(configure: Configure, jsonl: Jsonl, texts: list[str]) -> None:
    seen: list[PrepareProgress] = []
    manifest = prepare(configure(train=str(jsonl(texts)), tokenizer="train"), seen.append)
    assert [seen[0].phase, seen[-1].phase] == ["tokenizer", "tokens"]
    tokens = [progress.num_train_tokens for progress in seen]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) > 3
    assert tokens[-1] == manifest.split("train").num_tokens
    assert seen[-1].num_validation_tokens == manifest.split("validation").num_tokens
    assert seen[-1].num_documents == 60
    assert seen[-1].fraction == 1.0
    assert seen[-1].tokens_per_second > 0
    assert seen[-1].num_text_bytes == sum(len(text.encode()) for text in texts)
    assert seen[-1].seconds_left == 0 or seen[-1].fraction_before == 1


def test_the_time_left_follows_from_the_share_done_since_the_beginning() -> None:
    values = dict.fromkeys(PrepareProgress.__dataclass_fields__, 0)
    values |= {"num_sources": 10, "num_sources_done": 4, "max_train_tokens": None, "phase_seconds": 60.0}
    assert PrepareProgress(**values).seconds_left == pytest.approx(90)
    assert PrepareProgress(**values | {"fraction_before": 0.2}).seconds_left == pytest.approx(180)
    assert PrepareProgress(**values | {"num_sources_done": 0}).seconds_left is None


def test_files_of_unknown_format_in_a_folder_are_named(
    configure: Configure, jsonl: Jsonl, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    jsonl(texts, "in/a.jsonl")
    for name in ("table.xlsx", "notes.pdf", ".hidden", "no_suffix"):
        (tmp_path / "in" / name).write_bytes(b"x")
    seen: list[PrepareProgress] = []
    prepare(configure(train=str(tmp_path / "in")), seen.append)
    assert seen[0].notes == ("3 files of unknown format are not read: no_suffix, notes.pdf, table.xlsx",)


def test_the_environment_is_left_as_it_was(
    configure: Configure, jsonl: Jsonl, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    prepare(configure(train=str(jsonl(texts))))
    assert "TOKENIZERS_PARALLELISM" not in os.environ


@pytest.mark.parametrize(("name", "dtype", "vocab_size"), [("mistral-v1", "uint16", 32000), ("gpt2", "uint16", 50257)])
def test_real_tokenizers_prepare_real_text(
    configure: Configure, jsonl: Jsonl, shared_data: Path, name: str, dtype: str, vocab_size: int
) -> None:
    with gzip.open(shared_data / "corpus" / "validation-000.jsonl.gz", "rt", encoding="utf-8") as stream:
        real = [json.loads(line)["text"][:3000] for line in stream][:40]
    config = configure(vocab_size=vocab_size, train=str(jsonl(real)), tokenizer=str(shared_data / "tokenizers" / name))
    manifest = prepare(config)
    assert sorted(documents(config, "train") + documents(config, "validation")) == sorted(real)
    assert (manifest.dtype, manifest.tokenizer.vocab_size) == (dtype, vocab_size)
    saved = config.prepared_dir / "tokenizer" / "tokenizer.json"
    assert manifest.tokenizer.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()


def test_the_saved_tokenizer_gives_the_tokens_of_training_though_the_given_one_adds_bos(
    configure: Configure, jsonl: Jsonl, texts: list[str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    given = load_tokenizer(tokenizer_dir)
    given.add_special_tokens({"bos_token": "<s>"})
    bos = given.bos_token_id
    given.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    given.save_pretrained(tmp_path / "given")
    config = configure(vocab_size=400, train=str(jsonl(texts)), tokenizer=str(tmp_path / "given"))
    prepare(config)
    saved = load_tokenizer(config.prepared_dir / "tokenizer")
    dataset = TokenDataset(config.prepared_dir, "train")
    for number, text in enumerate(documents(config, "train")):
        assert [*saved(text).input_ids, saved.eos_token_id] == dataset.document(number).tolist()
    assert load_tokenizer(tmp_path / "given")("x").input_ids[0] == bos


HOLD_THE_LOCK = """
import sys
from pathlib import Path
from steplm.data.shards import locked
with locked(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_waits_says_so_once_and_takes_what_the_first_has_finished(
    configure: Configure, jsonl: Jsonl, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, config = (
        configure(train=str(jsonl(texts)), prepared_dir=str(tmp_path / name)) for name in ("elsewhere", "prepared")
    )
    manifest = prepare(elsewhere)
    seen: list[str] = []

    def release(progress: PrepareProgress) -> None:
        """The other process finishes its work only once it is known that this one waits."""
        seen.append(progress.phase)
        shutil.copytree(elsewhere.prepared_dir, config.prepared_dir, dirs_exist_ok=True)
        other.communicate("\n", timeout=30)

    command = [sys.executable, "-c", HOLD_THE_LOCK, str(config.prepared_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(prepare_module, "_write_shards", None)  # nothing is prepared twice
        assert prepare(config, release) == manifest
    assert seen == ["waiting for another process"]


def test_changed_inputs_are_told_in_words() -> None:
    digest = "0123456789abcdef" * 4
    before = {"data.train": ["a.txt", "b.txt"], "data.validation": [], "data.shard_tokens": 8}
    now = {
        "data.train": ["b.txt", "c.txt"],
        "data.validation": ["d.txt"],
        "data.shard_tokens": 9,
        "tokenizer files": {},
    }
    assert _changes(before, now).splitlines() == [
        "  data.shard_tokens: was 8, is 9",
        "  data.train: was a.txt, is c.txt",
        "  data.validation: was not set, is d.txt",
    ]
    files = "  tokenizer files: was not set, is tokenizer.json (0123456789ab)"
    assert _changes({}, {"tokenizer files": {"tokenizer.json": digest}}) == files
    for texts, told in ((["a"], "no longer b"), (["a", "b", "c"], "now also c"), (["b", "a"], "in another order")):
        assert _changes({"data.train": ["a", "b"]}, {"data.train": texts}) == f"  data.train: {told}"
