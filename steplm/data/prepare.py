"""Documents -> token shards, in parallel and resumable; the output is byte-identical for any number of workers.

One thread reads the documents in order, several tokenize them in batches, and the results are written in order.
Progress is saved every 30 seconds and whenever a shard is finished; an interrupted preparation resumes from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from steplm.config import RunConfig
from steplm.data.formats import Place
from steplm.data.seen import SeenDocuments
from steplm.data.shards import ShardWriter, WriterState, disk_errors, locked, write_json
from steplm.data.sources import BadRecords, Source, describe_skipped, find_sources
from steplm.data.token_files import TokenFile, find_token_files, names_tokens, take_over
from steplm.data.tokenizer import load_tokenizer, tokenizer_files, train_tokenizer, without_added_tokens
from steplm.data.tokens import (
    MANIFEST,
    SCHEMA_VERSION,
    Count,
    Manifest,
    SplitManifest,
    TokenizerManifest,
    check_sizes,
)
from steplm.errors import ConfigError, DataError
from steplm.files import file_sha256
from steplm.types import from_json, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INPUTS = "inputs.json"
UNFINISHED = "unfinished.json"
SAVE_SECONDS = 30.0
BATCH_BYTES = 2**19
TOKENIZER_SAMPLE_BYTES = 50_000_000
MIN_RECORDS_TO_JUDGE = 1000  # with fewer, one early bad record would stop a good run
HOPELESS = 10  # times the allowed share of bad records, at which ``prepare`` stops before the end


@dataclass(frozen=True)
class PrepareProgress:
    """Progress so far; ``num_reused_tokens`` were already written when this call started."""

    phase: str  # "waiting for another process", "tokenizer" or "tokens"
    source: str
    num_sources_done: int
    num_sources: int
    num_documents: int
    num_train_tokens: int
    num_validation_tokens: int
    num_reused_tokens: int
    num_bad_records: int
    num_text_bytes: int  # UTF-8
    max_train_tokens: int | None
    elapsed_seconds: float
    phase_seconds: float
    fraction_before: float = 0.0  # ``fraction`` at the start of the phase
    notes: tuple[str, ...] = ()  # notes for the user known from the start, such as files that are not read

    @property
    def tokens_per_second(self) -> float:
        new_tokens = self.num_train_tokens + self.num_validation_tokens - self.num_reused_tokens
        return new_tokens / max(self.phase_seconds, 1e-9)

    @property
    def fraction(self) -> float:
        """Share of the work done, 0 to 1; coarse because sources differ in size."""
        by_tokens = self.num_train_tokens / self.max_train_tokens if self.max_train_tokens else 0.0
        return min(max(by_tokens, self.num_sources_done / self.num_sources), 1.0)

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the speed so far; None if unknown."""
        gained = self.fraction - self.fraction_before
        return self.phase_seconds * (1 - self.fraction) / gained if gained > 0 else None


OnProgress = Callable[[PrepareProgress], None]


def prepare(config: RunConfig, on_progress: OnProgress | None = None) -> Manifest:
    """Prepare the tokens that ``config`` asks for in ``config.prepared_dir``.

    Finished work on the same inputs is returned immediately, and unfinished work is resumed. Unfinished work
    on other inputs is discarded. Only one process at a time works in a folder; others wait for it.

    Raises:
        ConfigError: no training text is given, or the tokenizer's vocabulary is larger than the model's.
        DataError: the text or tokenizer is unusable, there are too many bad records, the disk is full, or the
            folder contains finished tokens of other inputs.
        HubUnavailable: the hub is needed and cannot be reached.
    """
    config = with_prepared_dir(config)
    folder, data = config.prepared_dir, config.data
    skipped: list[Path] = []
    try:
        found = _find_inputs(config, skipped)
    except DataError:
        # Data prepared elsewhere may have its shards here but not its text.
        if (folder / MANIFEST).is_file():
            return _finished(folder, _describe_inputs(config, {}), config)
        raise
    inputs = _describe_inputs(config, found)
    if (folder / MANIFEST).is_file():
        return _finished(folder, inputs, config)
    notes = (describe_skipped(skipped),) if skipped else ()
    progress = _Progress(config, sum(map(len, found.values())), on_progress, notes)
    with disk_errors(folder), locked(folder, lambda: progress.report("waiting for another process", Counts())):
        if (folder / MANIFEST).is_file():
            return _finished(folder, inputs, config)
        _discard_other_work(folder, inputs)
        before = _read_reached(folder)
        sources = _pinned(found, before.revisions if before else {})
        token_files = {split: [file for file in files if isinstance(file, TokenFile)] for split, files in found.items()}
        tokenizer = _make_tokenizer(folder, config, sources, progress)
        vocab_size = _vocab_size(tokenizer)
        _check_vocabulary(vocab_size, config)
        is_wide = vocab_size > 2**16 or any(file.itemsize == 4 for files in token_files.values() for file in files)
        dtype: Literal["uint16", "uint32"] = "uint32" if is_wide else "uint16"
        open_writer = partial(
            ShardWriter, dtype=dtype, shard_tokens=data.shard_tokens, end_of_text=tokenizer.eos_token_id
        )
        reached, writers, seen = _go_on(folder, before, sources, token_files, open_writer)
        try:
            counts = _write_shards(config, sources, tokenizer, writers, seen, reached, progress)
            for split, files in token_files.items():
                if not files:
                    continue
                count_text = split.startswith("validation")  # bits per byte are reported only for validation
                take_over(files, writers[split], tokenizer, vocab_size, count_text=count_text)
                counts.num_sources_done += len(files)
                progress.report("tokens", counts, writers)
        finally:
            for writer in writers.values():
                writer.abandon()
            seen.close()
        manifest = Manifest(
            fingerprint=_sha256(inputs),
            dtype=dtype,
            tokenizer=TokenizerManifest(
                name=data.tokenizer,
                vocab_size=vocab_size,
                eos_token_id=tokenizer.eos_token_id,
                sha256=file_sha256(folder / "tokenizer" / "tokenizer.json"),
            ),
            splits={split: SplitManifest(tuple(writer.shards)) for split, writer in writers.items()},
            num_records=counts.bad.num_records,
            num_bad_records=counts.bad.num_bad,
            num_duplicates=counts.num_duplicates,
            bad_records=tuple(counts.bad.examples),
        )
        _check_not_empty(manifest, config)
        write_json(folder / MANIFEST, to_json(manifest))
        (folder / UNFINISHED).unlink(missing_ok=True)
        seen.close(remove=True)
    return manifest


def with_prepared_dir(config: RunConfig) -> RunConfig:
    """Set ``data.prepared_dir`` if it is not given, to a name derived from a hash of the inputs.

    Runs with the same text and tokenizer therefore share their shards, and other runs never use them.
    """
    if config.data.prepared_dir is not None:
        return config
    folder = Path("prepared") / _sha256(_describe_inputs(config, _find_inputs(config)))[:12]
    return config.model_copy(update={"data": config.data.model_copy(update={"prepared_dir": str(folder)})})


Inputs = Mapping[str, Sequence[Source | TokenFile]]  # by split: text, or another program's tokens


def _find_inputs(config: RunConfig, skipped: list[Path] | None = None) -> Inputs:
    data = config.data
    if not data.train:
        raise ConfigError("data.train is empty. Name files, folders or a hub data set, or builtin://python-docs.")
    if data.weights and data.max_train_tokens is not None:
        raise ConfigError(
            "data.max_train_tokens limits one list of text, and data.train is a mixture. Name fewer files."
        )
    with_tokens = [split for split, entries in data.splits.items() if any(map(names_tokens, entries))]
    for split in with_tokens:
        _check_use_of_tokens(config, split)
    return {
        split: find_token_files(entries) if split in with_tokens else find_sources(entries, skipped)
        for split, entries in data.splits.items()
    }


def _check_use_of_tokens(config: RunConfig, split: str) -> None:
    data = config.data
    if not all(map(names_tokens, data.splits[split])):
        raise ConfigError(f"data.{split} names text and tokens (.bin) in one list: give each a name of its own.")
    if data.tokenizer == "train":
        raise ConfigError(f"data.{split} holds tokens: set data.tokenizer to the one that made them.")
    if not data.validation:
        raise ConfigError("data.train holds tokens, of which no validation text is split off: set data.validation.")
    if data.max_train_tokens is not None:
        raise ConfigError("data.max_train_tokens limits text, and data.train holds tokens. Name fewer files.")


# Inputs are exactly what the shards depend on. num_workers and within_documents do not change any token.


def _describe_inputs(config: RunConfig, found: Inputs) -> dict[str, Any]:
    """Describe the inputs; ``found`` is empty if the text is no longer available."""
    data = config.data
    inputs: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "data.text_field": data.text_field,
        "data.shard_tokens": data.shard_tokens,
        "data.max_train_tokens": data.max_train_tokens,
        "data.tokenizer": data.tokenizer,
    }
    if not data.validation:
        inputs["data.validation_fraction"] = data.validation_fraction
    if data.tokenizer == "train":
        inputs["model.vocab_size"] = config.model.vocab_size
    else:
        files = tokenizer_files(data.tokenizer)
        inputs["tokenizer files"] = {file.name: file_sha256(file) for file in files}
    return inputs | {f"data.{split}": [each.describe() for each in parts] for split, parts in found.items()}


def _sha256(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _finished(folder: Path, inputs: dict[str, Any], config: RunConfig) -> Manifest:
    manifest = Manifest.load(folder)
    before = _read_inputs(folder)
    if manifest.fingerprint != _sha256({**before, **inputs}):
        changes = _changes({key: before.get(key) for key in inputs}, inputs)
        raise DataError(
            f"{folder} holds the tokens of other inputs:\n{changes}\n"
            "Set data.prepared_dir to a new folder, or remove this one.",
            path=str(folder),
        )
    check_sizes(folder, manifest)
    _check_vocabulary(manifest.tokenizer.vocab_size, config)
    BadRecords(
        manifest.num_records, manifest.num_bad_records, list(manifest.bad_records), config.data.max_bad_share
    ).check()
    return manifest


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if (old or None) == (new or None):
            continue
        if old and new and isinstance(old, list) and isinstance(new, list):
            old, new = [x for x in old if x not in new], [x for x in new if x not in old]
            if not (old and new):
                change = f"no longer {_described(old)}" if old else f"now also {_described(new)}"
                lines.append(f"  {key}: {change if old or new else 'in another order'}")
                continue
        lines.append(f"  {key}: was {_described(old)}, is {_described(new)}")
    return "\n".join(lines) or "  (inputs.json is missing)"


def _described(value: Any) -> str:
    """An input for a message; of files with their hashes, the first digits of each hash."""
    if value is None or value in ([], {}):
        return "not set"
    if isinstance(value, dict):
        value = [f"{name} ({str(digest)[:12]})" for name, digest in value.items()]
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value))[:300]


def _read_inputs(folder: Path) -> dict[str, Any]:
    try:
        inputs = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return inputs if isinstance(inputs, dict) else {}


def _discard_other_work(folder: Path, inputs: dict[str, Any]) -> None:
    if _read_inputs(folder) == inputs:
        return
    for name in (INPUTS, UNFINISHED):
        (folder / name).unlink(missing_ok=True)
    for name in ("train", "validation", "tokenizer"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / INPUTS, inputs)


def _vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The number of embedding rows needed, which exceeds the number of tokens if there are gaps between their IDs."""
    return max(tokenizer.get_vocab().values()) + 1


def _check_vocabulary(vocab_size: int, config: RunConfig) -> None:
    if vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer!r} has {vocab_size:,} tokens, more than "
            f"model.vocab_size={config.model.vocab_size:,}. "
            f"Set model.vocab_size={vocab_size}, or choose another data.tokenizer.",
            vocab_size=vocab_size,
            model_vocab_size=config.model.vocab_size,
        )


def _check_not_empty(manifest: Manifest, config: RunConfig) -> None:
    empty = next((name for name, split in manifest.splits.items() if not split.num_documents), None)
    if empty is None:
        return
    counts = Counter[str]()
    for name, split in manifest.splits.items():
        counts[name.partition("/")[0]] += split.num_documents
    num_train, num_validation = counts["train"], counts["validation"]
    kind, _, set_name = empty.partition("/")
    what = f"{'training' if kind == 'train' else kind} text{f' in {set_name}' if set_name else ''}"
    way_out = (
        "Check data.validation."
        if config.data.validation
        else f"Documents are split by hash: raise data.validation_fraction={config.data.validation_fraction}, name "
        "more text in data.train, or name files in data.validation."
    )
    raise DataError(
        f"no {what}: {num_train:,} training and {num_validation:,} validation documents of "
        f"{manifest.num_records:,} records. {way_out}",
        num_train=num_train,
        num_validation=num_validation,
    )


# The stream of documents.


class Entry(NamedTuple):
    """A document of the stream; ``position`` is its index among the distinct documents of all splits, from 0."""

    position: int
    split: str
    text: str
    num_bytes: int
    source: tuple[str, int]  # split in the configuration, index of the source in it
    place: Place


@dataclass
class Counts:
    """How much of the stream was read, and what was skipped."""

    bad: BadRecords = field(default_factory=BadRecords)
    num_duplicates: Count = 0
    num_sources_done: Count = 0
    num_documents: Count = 0
    num_text_bytes: Count = 0
    source: str = ""


@dataclass(frozen=True)
class Reached:
    """The progress of an unfinished preparation."""

    source: tuple[str, int]  # source of the last document used
    place: Count | Annotated[str, Field(pattern=r"^\d{1,9}:\d{1,18}$")]
    counts: Counts
    writers: dict[str, WriterState]
    revisions: dict[str, str]  # commits of the hub data sets


def _read_reached(folder: Path) -> Reached | None:
    try:
        return from_json(Reached, json.loads((folder / UNFINISHED).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def _go_on(
    folder: Path,
    reached: Reached | None,
    sources: Mapping[str, Sequence[Source]],
    token_files: Mapping[str, Sequence[TokenFile]],
    open_writer: Callable[..., ShardWriter],
) -> tuple[Reached | None, dict[str, ShardWriter], SeenDocuments]:
    """Return the saved progress if it can be resumed, with the writers and seen documents at that point."""
    if reached is not None:
        try:
            split, index = reached.source
            if index not in range(len(sources.get(split, ()))):
                raise ValueError(f"there is no source {index} of {split}")
            if isinstance(reached.place, str) and not sources[split][index].is_on_hub:
                raise ValueError(f"there is no place {reached.place!r} in a source")
            if not 0 <= reached.counts.bad.num_bad <= reached.counts.bad.num_records:
                raise ValueError("a number is below 0")
            writers = {name: open_writer(folder / name, state=reached.writers.get(name)) for name in sources}
            return reached, writers, SeenDocuments(folder, reached.counts.num_documents)
        except ValueError:  # a file is missing or damaged: start over
            (folder / UNFINISHED).unlink()
    for name in sources:
        if not token_files[name]:
            shutil.rmtree(folder / name, ignore_errors=True)
    return None, {name: open_writer(folder / name) for name in sources}, SeenDocuments(folder)


def _pinned(found: Inputs, revisions: Mapping[str, str]) -> dict[str, list[Source]]:
    """The text, with each hub data set pinned to one commit, so that a resumed preparation reads the same data."""

    def pinned(source: Source) -> Source:
        return replace(source, revision=revisions[source.name]) if source.name in revisions else source.pinned()

    return {split: [pinned(source) for source in parts if isinstance(source, Source)] for split, parts in found.items()}


def _stream(
    config: RunConfig,
    sources: Mapping[str, Sequence[Source]],
    counts: Counts,
    seen: SeenDocuments,
    reached: Reached | None = None,
) -> Iterator[Entry]:
    """Yield distinct documents, validation text first, so that its copies in the training text are dropped."""
    places = [(split, index) for split, found in sources.items() for index in range(len(found))]
    first = 0 if reached is None else places.index(reached.source)
    for split, index in places[first:]:
        source = sources[split][index]
        counts.source = source.name
        after = reached.place if reached is not None and reached.source == (split, index) else None
        for document in source.documents(config.data.text_field, counts.bad, after):
            data = document.text.encode()
            key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
            if not seen.add(key):
                counts.num_duplicates += 1
                continue
            split_off = not config.data.validation and key < config.data.validation_fraction * 2**64
            to_split = "validation" if split_off else split
            counts.num_documents += 1
            counts.num_text_bytes += len(data)
            yield Entry(counts.num_documents - 1, to_split, document.text, len(data), (split, index), document.place)
        counts.num_sources_done += 1


def _sample(config: RunConfig, sources: Mapping[str, Sequence[Source]], progress: _Progress) -> Iterator[str]:
    """Yield training text for the tokenizer: 50 MB in total, with an equal share from each source."""
    texts = [source for split, found in sources.items() if split.startswith("train") for source in found]
    for source in texts:
        counts = Counts(BadRecords(max_bad_share=config.data.max_bad_share), source=source.name)
        num_bytes = 0
        for entry in _stream(config, {"train": [source]}, counts, SeenDocuments(None)):
            if entry.split == "train":
                num_bytes += entry.num_bytes
                yield entry.text
            if num_bytes >= TOKENIZER_SAMPLE_BYTES // len(texts):
                break
        progress.report("tokenizer", counts)


# The tokenizer.


def _make_tokenizer(
    folder: Path, config: RunConfig, sources: Mapping[str, Sequence[Source]], progress: _Progress
) -> PreTrainedTokenizerFast:
    """Load the tokenizer from ``folder/tokenizer``, after creating it there if missing."""
    target = folder / "tokenizer"
    if not target.is_dir():
        progress.report("tokenizer", Counts())
        spec = config.data.tokenizer
        if spec == "train":
            tokenizer = train_tokenizer(_sample(config, sources, progress), config.model.vocab_size)
        else:
            tokenizer = load_tokenizer(spec)
            _check_vocabulary(_vocab_size(tokenizer), config)
        unfinished = folder / "tokenizer.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        without_added_tokens(tokenizer).save_pretrained(unfinished)
        os.replace(unfinished, target)
    return load_tokenizer(target)


@contextmanager
def _without_inner_threads() -> Iterator[None]:
    """Disable the tokenizers library's own threads, which would compete with ours and make a later fork hang."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


# From documents to shards.


DocumentBatch = tuple[list[Entry], Counts]  # some documents, and the counts at their end
Tokens = npt.NDArray[np.unsignedinteger]


def _write_shards(
    config: RunConfig,
    sources: Mapping[str, Sequence[Source]],
    tokenizer: PreTrainedTokenizerFast,
    writers: Mapping[str, ShardWriter],
    seen: SeenDocuments,
    reached: Reached | None,
    progress: _Progress,
) -> Counts:
    """Tokenize and write everything after ``reached``; return the counts at the last document used."""
    limit = config.data.max_train_tokens

    def is_enough() -> bool:
        return limit is not None and writers["train"].num_tokens >= limit

    counts = deepcopy(reached.counts) if reached else Counts()
    counts.bad.max_bad_share = config.data.max_bad_share
    progress.num_reused_tokens = sum(writer.num_tokens for writer in writers.values())
    progress.report("tokens", counts, writers)
    encode = _encoder(tokenizer, next(iter(writers.values())).dtype)
    revisions = {s.name: s.revision for found in sources.values() for s in found if s.revision is not None}
    saved_at, saved_shards = time.monotonic(), sum(len(writer.shards) for writer in writers.values())
    batches = _batches(_stream(config, sources, counts, seen, reached), counts)
    for (entries, used), encoded in _in_order(batches, encode, config.data.num_workers or os.cpu_count() or 1):
        for entry, tokens in zip(entries, encoded, strict=True):
            writers[entry.split].append(entry.position, tokens, entry.num_bytes)
            if is_enough():
                break
        # Some more bad records than allowed may only stand close together.
        if used.bad.num_records >= MIN_RECORDS_TO_JUDGE and used.bad.share > HOPELESS * config.data.max_bad_share:
            used.bad.check()
        progress.report("tokens", used, writers)
        if is_enough():
            counts = used
            break
        num_shards = sum(len(writer.shards) for writer in writers.values())
        if num_shards > saved_shards or time.monotonic() > saved_at + SAVE_SECONDS:
            last = entries[-1]
            states = {split: writer.state() for split, writer in writers.items()}
            seen.sync()
            now = Reached(last.source, last.place, used, states, revisions)
            write_json(config.prepared_dir / UNFINISHED, to_json(now))
            saved_at, saved_shards = time.monotonic(), num_shards
    counts.bad.check()
    for writer in writers.values():
        writer.close()
    return counts


def _batches(stream: Iterable[Entry], counts: Counts) -> Iterator[DocumentBatch]:
    """Yield batches of half a megabyte with the counts at their end; they depend only on the stream."""
    entries: list[Entry] = []
    num_bytes = 0
    for entry in stream:
        entries.append(entry)
        num_bytes += entry.num_bytes
        if num_bytes >= BATCH_BYTES:
            yield entries, deepcopy(counts)
            entries, num_bytes = [], 0
    if entries:
        yield entries, deepcopy(counts)


def _encoder(tokenizer: PreTrainedTokenizerFast, dtype: np.dtype[Any]) -> Callable[[DocumentBatch], list[Tokens]]:
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # a literal "</s>" is text, not the end of a document
    backend.no_truncation()
    backend.no_padding()
    end = [tokenizer.eos_token_id]

    def encode(batch: DocumentBatch) -> list[Tokens]:
        encodings = backend.encode_batch_fast([entry.text for entry in batch[0]], add_special_tokens=False)
        return [np.array(encoding.ids + end, dtype) for encoding in encodings]

    return encode


def _in_order(
    batches: Iterable[DocumentBatch], encode: Callable[[DocumentBatch], list[Tokens]], num_workers: int
) -> Iterator[tuple[DocumentBatch, list[Tokens]]]:
    """Encode the batches with ``num_workers`` threads; yield results in the order of the batches.

    Threads, not processes: tokenizing releases the GIL, nothing is copied, and programs without a
    ``__main__`` guard work. On two cores, threads were at least as fast as processes and as the library's own
    threads.
    """
    pending: deque[tuple[DocumentBatch, Future[list[Tokens]]]] = deque()
    with _without_inner_threads(), ThreadPoolExecutor(num_workers, "tokenize") as pool:
        try:
            for batch in batches:
                pending.append((batch, pool.submit(encode, batch)))
                if len(pending) > num_workers + 1:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()


class _Progress:
    """Builds a ``PrepareProgress`` and passes it to the callback."""

    def __init__(
        self,
        config: RunConfig,
        num_sources: int,
        on_progress: OnProgress | None,
        notes: tuple[str, ...],
    ) -> None:
        self.notes = notes
        self.max_train_tokens = config.data.max_train_tokens
        self.num_sources = num_sources
        self.on_progress = on_progress
        self.started_at = time.monotonic()
        self.num_reused_tokens = 0
        self.phase = ""
        self.fraction_before = 0.0

    def report(
        self,
        phase: str,
        counts: Counts,
        writers: Mapping[str, ShardWriter] | None = None,
    ) -> None:
        if self.on_progress is None:
            return
        is_first = phase != self.phase
        if is_first:
            self.phase, self.phase_started_at, self.fraction_before = phase, time.monotonic(), 0.0
        progress = PrepareProgress(
            phase=phase,
            source=counts.source,
            num_sources_done=counts.num_sources_done,
            num_sources=self.num_sources,
            num_documents=counts.num_documents,
            num_train_tokens=_num_tokens(writers, "train"),
            num_validation_tokens=_num_tokens(writers, "validation"),
            num_reused_tokens=self.num_reused_tokens,
            num_bad_records=counts.bad.num_bad,
            num_text_bytes=counts.num_text_bytes,
            max_train_tokens=self.max_train_tokens,
            elapsed_seconds=time.monotonic() - self.started_at,
            phase_seconds=time.monotonic() - self.phase_started_at,
            fraction_before=self.fraction_before,
            notes=self.notes,
        )
        if is_first:
            self.fraction_before = progress.fraction
        self.on_progress(progress)


def _num_tokens(writers: Mapping[str, ShardWriter] | None, kind: str) -> int:
    return sum(writer.num_tokens for split, writer in (writers or {}).items() if split.partition("/")[0] == kind)
