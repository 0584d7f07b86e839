"""``suite.json``: the runs of a suite, their status, and the questions of its report.

``steplm compare`` writes it after every event, and ``steplm report`` reads it. Layout of a suite directory:

    suite.json               this document
    suite.yaml               the suite as the user wrote it
    runs/ENTRY/lr0.004-seed0/    run directories, each with evaluations.json:
                             {"wikitext2": {"loss", "perplexity", "bits_per_byte", "num_tokens"}, ...}
    report/                  tables, figures and the page

All paths in ``suite.json`` are relative to the directory, so that the directory can be copied.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steplm.errors import SteplmError
from steplm.files import write_atomically
from steplm.report.documents import parse_json
from steplm.types import from_json, to_json
from steplm.units import reason, shortened

SCHEMA_VERSION = 1
SUITE_FILE = "suite.json"

Status = Literal["waiting", "running", "finished", "diverged", "failed"]


@dataclass(frozen=True)
class EntryRecord:
    """One method of a suite; the learning rate is ``None`` until tuning has chosen one."""

    name: str
    label: str
    method: str
    like: str | None = None
    match: str = "tokens"
    settings: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    learning_rate: float | None = None
    at_edge: bool = False  # the best rate is the lowest or highest of the grid
    seeds: tuple[int, ...] = ()  # (): the suite's


@dataclass(frozen=True)
class RunEntry:
    """One run of a suite; ``shared_from`` is the directory of the run that it branched off from."""

    entry: str
    seed: int
    learning_rate: float
    dir: str
    status: Status = "waiting"
    error: str | None = None
    shared_from: str | None = None


@dataclass(frozen=True)
class Question:
    """A group of entries, usually compared with a baseline: one table and its figures."""

    title: str
    entries: tuple[str, ...]
    baseline: str | None = None
    text: str = ""


@dataclass(frozen=True)
class SuiteRecord:
    """The content of ``suite.json``."""

    name: str
    match: str  # what is equal across entries: "tokens" or "flops"
    seeds: tuple[int, ...]
    entries: tuple[EntryRecord, ...]
    runs: tuple[RunEntry, ...] = ()
    questions: tuple[Question, ...] = ()
    grid: tuple[float, ...] = ()  # learning rates tried
    tune_seed: int = 0
    baseline: str | None = None
    schema_version: int = SCHEMA_VERSION
    finalists: int = 1  # rates per method that all seeds were run at before choosing

    def entry(self, name: str) -> EntryRecord:
        """The entry with this name; ``KeyError`` if there is none."""
        return {entry.name: entry for entry in self.entries}[name]

    def runs_of(self, name: str, *, chosen: bool = True) -> tuple[RunEntry, ...]:
        """Runs of an entry, sorted by learning rate and seed: those that count, or all."""
        runs = [run for run in self.runs if run.entry == name and (not chosen or self.counts(run))]
        return tuple(sorted(runs, key=lambda run: (run.learning_rate, run.seed)))

    def counts(self, run: RunEntry) -> bool:
        """Whether the run has one of its entry's seeds and the chosen rate; a tuning run may count too."""
        entry = self.entry(run.entry)
        return run.learning_rate == entry.learning_rate and run.seed in (entry.seeds or self.seeds)


def is_suite(directory: str | Path) -> bool:
    """Whether the directory holds a suite."""
    return (Path(directory) / SUITE_FILE).is_file()


def save_suite(record: SuiteRecord, directory: str | Path) -> Path:
    """Write ``suite.json`` atomically: a reader finds the old document or the new one, never half of one."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / SUITE_FILE
    write_atomically(path, json.dumps(to_json(record), indent=1) + "\n")
    return path


def load_suite(directory: str | Path) -> SuiteRecord:
    """Read ``suite.json``.

    Raises:
        SteplmError: the file is missing, from another version, or invalid.
    """
    path = Path(directory) / SUITE_FILE
    if not path.is_file():
        raise SteplmError(f"{directory} is not a suite directory: it has no {SUITE_FILE}", path=str(directory))
    try:
        values = parse_json(path.read_bytes())
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise SteplmError(
                f"{path} has schema version {shortened(version)}, this steplm reads {SCHEMA_VERSION}. "
                "Use the version of steplm that wrote it.",
                path=str(path),
                schema_version=version,
            )
        record = from_json(SuiteRecord, values)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise SteplmError(f"{path} cannot be read: {reason(error)}", path=str(path)) from None
    _check_names(record, path)
    _check_numbers(record, path)
    return record


def _check_numbers(record: SuiteRecord, path: Path) -> None:
    chosen = [entry.learning_rate for entry in record.entries if entry.learning_rate is not None]
    rates = [*chosen, *record.grid, *(run.learning_rate for run in record.runs)]
    if not all(0 < rate < math.inf for rate in rates):
        raise SteplmError(f"{path} has invalid learning rates: {min(rates)} to {max(rates)}", path=str(path))


def _check_names(record: SuiteRecord, path: Path) -> None:
    known = {entry.name for entry in record.entries}
    named = {record.baseline, *(run.entry for run in record.runs)}
    for question in record.questions:
        named |= {question.baseline, *question.entries}
    unknown = sorted(name for name in named - known if name is not None)
    if unknown:
        raise SteplmError(
            f"{path} names entries that it does not have: {', '.join(unknown)[:300]}. It has: "
            f"{', '.join(sorted(known))}.",
            path=str(path),
            unknown=unknown,
        )
