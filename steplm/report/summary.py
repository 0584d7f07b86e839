"""The numbers of a suite: per run, per entry over its seeds, and per entry against a baseline.

Results come from finished runs only. Losses are in nats per token and memory in bytes. Intervals are 95% Student's t
intervals of the mean over seeds; a single run has none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from steplm.errors import SteplmError
from steplm.planner.plan import Plan
from steplm.report.archive import unpacked
from steplm.report.documents import Environment, Evaluations, read_document
from steplm.report.runs import RunRecord, load_run
from steplm.report.suite import EntryRecord, Question, RunEntry, Status, SuiteRecord, is_suite, load_suite
from steplm.units import perplexity_of

CONFIDENCE = 0.95
SEARCH_DEPTH = 3  # folder levels searched for runs


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and its interval; ``low`` and ``high`` are ``None`` for one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def exp(self) -> Estimate:
        """The perplexity of a loss, with the ends of its interval transformed likewise."""
        low, high = (None if end is None else perplexity_of(end) for end in (self.low, self.high))
        return Estimate(perplexity_of(self.mean), low, high, self.n)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95% t-interval, ``mean ± t(n - 1) s / √n``; ``None`` without values."""
    if not values:
        return None
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, None, 1)
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class SuiteRun:
    """One run: its entry in ``suite.json`` and, once it has begun, the documents of its directory."""

    entry: RunEntry
    counts: bool  # has one of its entry's seeds and the chosen learning rate
    record: RunRecord | None = None
    evaluations: dict[str, dict[str, Any]] | None = None
    environment: dict[str, Any] | None = None

    @property
    def result(self) -> RunRecord | None:
        """The record of a finished run."""
        has_result = self.entry.status == "finished" and self.record is not None and self.record.summary is not None
        return self.record if has_result else None

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def plan(self) -> Plan | None:
        return None if self.record is None else self.record.plan

    @property
    def validation_loss(self) -> float | None:
        """Validation loss of the exported model."""
        return None if self.result is None or self.result.summary is None else self.result.summary["validation_loss"]

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Scores of a finished run by text, from ``evaluations.json``."""
        return (self.evaluations or {}) if self.finished else {}

    def loss_on(self, text: str | None) -> float | None:
        """Loss on a text of ``evaluations.json``, or for ``None`` on the validation text."""
        return self.validation_loss if text is None else self.scores.get(text, {}).get("loss")

    def _largest(self, event: str, key: str) -> int | None:
        """The largest value of a key in the events of one kind; ``None`` if no event has the key."""
        events = self.result.events_of(event) if self.result else []
        return max((e[key] for e in events if e.get(key) is not None), default=None)

    @cached_property
    def row(self) -> dict[str, Any]:
        """A row of ``runs.csv``: every number of the run, by a name that includes its unit."""
        plan, result, loss = self.plan, self.result, self.validation_loss
        return {
            "entry": self.entry.entry,
            "seed": self.entry.seed,
            "learning_rate": self.entry.learning_rate,
            "counts": self.counts,
            "status": self.entry.status,
            "error": self.entry.error,
            "directory": self.entry.dir,
            "shared_from": self.entry.shared_from,
            "layers": plan and "+".join(map(str, plan.layers)),
            "parameters": plan and plan.shape.num_parameters(),
            "tokens": result and result.tokens_seen,
            "training_flops": result and result.plan.training_flops,
            "validation_loss_nats_per_token": loss,
            "validation_perplexity": None if loss is None else perplexity_of(loss),
            **{
                f"{text}_{key}": value
                for text, scores in self.scores.items()
                for key, value in scores.items()
                if isinstance(value, int | float)
            },
            "planned_peak_model_state_bytes": plan and plan.peak_model_state_bytes,
            "measured_peak_model_state_bytes": result and result.measured_model_state_bytes,
            "planned_peak_bytes": plan and plan.peak_bytes,
            "measured_peak_allocated_bytes": self._largest("train", "peak_allocated_bytes"),
            "planned_dry_run_peak_bytes": self._largest("stage_start", "planned_dry_run_bytes"),
            "measured_dry_run_peak_bytes": self._largest("stage_start", "measured_dry_run_bytes"),
            "median_tokens_per_second": result and result.median_tokens_per_second,
            "elapsed_seconds": result and result.elapsed_seconds,
        }


@dataclass(frozen=True)
class EntrySummary:
    """One method over its seeds, at its chosen learning rate."""

    entry: EntryRecord
    runs: tuple[SuiteRun, ...]  # those that count, by seed

    @property
    def label(self) -> str:
        return self.entry.label

    @property
    def finished(self) -> tuple[SuiteRun, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def record(self) -> RunRecord | None:
        """The record of a finished run, else of any run with a plan; the plan does not depend on the seed."""
        return next((run.record for run in (*self.finished, *self.runs) if run.record is not None), None)

    @property
    def plan(self) -> Plan | None:
        return None if self.record is None else self.record.plan

    @cached_property
    def validation_loss(self) -> Estimate | None:
        return self._estimate("validation_loss_nats_per_token")

    @cached_property
    def losses(self) -> dict[str, Estimate]:
        """Losses by text, over the seeds scored on it."""
        texts = dict.fromkeys(text for run in self.finished for text in run.scores)
        estimates = {text: self._estimate(f"{text}_loss") for text in texts}
        return {text: value for text, value in estimates.items() if value is not None}

    def bits_per_byte(self, text: str) -> Estimate | None:
        return self._estimate(f"{text}_bits_per_byte")

    def _values(self, name: str) -> list[Any]:
        """The values of a column of ``runs.csv``, of the finished seeds that have one."""
        return [value for run in self.finished if (value := run.row.get(name)) is not None]

    def _estimate(self, name: str) -> Estimate | None:
        return estimate(self._values(name))

    def _largest(self, name: str) -> int | None:
        return max(self._values(name), default=None)

    def _median(self, name: str) -> float | None:
        values = self._values(name)
        return statistics.median(values) if values else None

    @property
    def state(self) -> str:
        """``"3"`` finished seeds, or ``"2 of 3: seed 2 diverged"``."""
        if not self.runs:
            return "not begun" if self.entry.learning_rate is not None else "no learning rate"
        if len(self.finished) == len(self.runs):
            return str(len(self.runs))
        reasons = [(run, "has no results" if run.entry.status == "finished" else run.entry.status) for run in self.runs]
        others = [f"seed {run.entry.seed} {reason}" for run, reason in reasons if not run.finished]
        return f"{len(self.finished)} of {len(self.runs)}: {', '.join(others)}"

    @cached_property
    def row(self) -> dict[str, Any]:
        """A row of ``summary.csv``: every number of the entry, by a name that includes its unit."""
        plan, loss = self.plan, self.validation_loss
        texts: dict[str, float | None] = {}
        for text, estimated in self.losses.items():
            texts |= _columns(f"{text}_loss_nats_per_token", estimated)
            texts |= _columns(f"{text}_perplexity", estimated.exp())
            texts |= _columns(f"{text}_bits_per_byte", self.bits_per_byte(text))
        return {
            "entry": self.entry.name,
            "label": self.entry.label,
            "method": self.entry.method,
            "learning_rate": self.entry.learning_rate,
            "learning_rate_at_edge": self.entry.at_edge,
            "finished_seeds": len(self.finished),
            "seeds": len(self.runs),
            "state": self.state,
            **_columns("validation_loss_nats_per_token", loss),
            **_columns("validation_perplexity", None if loss is None else loss.exp()),
            **texts,
            "planned_peak_model_state_bytes": plan and plan.peak_model_state_bytes,
            "measured_peak_model_state_bytes": self._largest("measured_peak_model_state_bytes"),
            "planned_peak_bytes": plan and plan.peak_bytes,
            "measured_peak_allocated_bytes": self._largest("measured_peak_allocated_bytes"),
            "planned_dry_run_peak_bytes": self._largest("planned_dry_run_peak_bytes"),
            "measured_dry_run_peak_bytes": self._largest("measured_dry_run_peak_bytes"),
            "tokens": self._largest("tokens"),
            "training_flops": self._largest("training_flops"),
            "median_tokens_per_second": self._median("median_tokens_per_second"),
            "median_elapsed_seconds": self._median("elapsed_seconds"),
        }


def _columns(name: str, value: Estimate | None) -> dict[str, float | None]:
    parts = (None, None, None) if value is None else (value.mean, value.low, value.high)
    return dict(zip((f"{name}_mean", f"{name}_ci95_low", f"{name}_ci95_high"), parts, strict=True))


@dataclass(frozen=True)
class Difference:
    """The loss of an entry minus the baseline's, paired by seed: the same seed means the same data order."""

    estimate: Estimate
    verdict: str  # "better", "worse", "no difference seen", "one seed: no verdict", or "1 of 3 diverged"


def difference(entry: EntrySummary, baseline: EntrySummary, text: str | None = None) -> Difference | None:
    """Paired difference in loss on a text, by default the validation text; ``None`` if no seed has both losses."""
    losses = {run.entry.seed: run.loss_on(text) for run in baseline.finished}
    gaps = [
        loss - reference
        for run in entry.finished
        if (reference := losses.get(run.entry.seed)) is not None and (loss := run.loss_on(text)) is not None
    ]
    gap = estimate(gaps)
    if gap is None:
        return None
    for side, whose in ((entry, ""), (baseline, " of the baseline")):
        if diverged := sum(run.entry.status == "diverged" for run in side.runs):
            # A mean over the surviving seeds would flatter the method.
            return Difference(gap, f"{diverged} of {len(side.runs)}{whose} diverged")
    if gap.low is None or gap.high is None:
        return Difference(gap, "one seed: no verdict")
    if gap.high < 0:
        return Difference(gap, "better")
    return Difference(gap, "worse" if gap.low > 0 else "no difference seen")


@dataclass(frozen=True)
class Suite:
    """A suite as read from its directory."""

    record: SuiteRecord
    runs: tuple[SuiteRun, ...]

    @cached_property
    def entries(self) -> dict[str, EntrySummary]:
        """Entries by name, in the order of the suite."""
        runs = sorted((run for run in self.runs if run.counts), key=lambda run: run.entry.seed)
        return {
            entry.name: EntrySummary(entry, tuple(run for run in runs if run.entry.entry == entry.name))
            for entry in self.record.entries
        }

    @property
    def texts(self) -> list[str]:
        """Names of all texts that any run was evaluated on."""
        return list({name: None for entry in self.entries.values() for name in entry.losses})

    def of(self, question: Question) -> list[EntrySummary]:
        """The entries of a question, baseline first."""
        names = dict.fromkeys([*([question.baseline] if question.baseline else []), *question.entries])
        return [self.entries[name] for name in names]

    @property
    def any_run(self) -> SuiteRun | None:
        """A run that tells what the suite ran on, if possible a finished one."""
        runs = [run for run in self.runs if run.record is not None]
        return next((run for run in runs if run.finished), runs[0] if runs else None)


def read_suite(directory: str | Path) -> Suite:
    """Read a suite directory, a run directory, or a folder of run directories; each run is then an entry.

    Any of them may be archived: see ``steplm.report.archive``.

    Raises:
        SteplmError: the directory is none of the three.
    """
    with unpacked(Path(directory)) as folder:
        record = load_suite(folder) if is_suite(folder) else _suite_of_runs(folder)
        return Suite(record, tuple(_read_run(folder, run, record) for run in record.runs))


def _read_run(directory: Path, run: RunEntry, suite: SuiteRecord) -> SuiteRun:
    folder, counts = directory / run.dir, suite.counts(run)
    if not (folder / "plan.json").is_file() or not (folder / "config.yaml").is_file():
        return SuiteRun(run, counts)
    evaluations = read_document(Evaluations, folder / "evaluations.json")
    environment = read_document(Environment, folder / "environment.json")
    return SuiteRun(run, counts, load_run(folder, label=suite.entry(run.entry).label), evaluations, environment)


def _suite_of_runs(directory: Path) -> SuiteRecord:
    """A suite with one entry for every run below a folder, and one question for all of them."""
    patterns = ["/".join(["*"] * depth + ["plan.json"]) for depth in range(SEARCH_DEPTH + 1)]
    plans = (path.parent for pattern in patterns for path in directory.glob(pattern))
    folders = sorted(folder for folder in plans if (folder / "config.yaml").is_file())  # exports have a plan.json too
    if not folders:
        raise SteplmError(
            f"{directory} holds neither a suite (suite.json) nor a run (plan.json). "
            "Give the directory of `steplm compare` or of `steplm train`.",
            path=str(directory),
        )
    entries, runs = [], []
    for folder in folders:
        record = load_run(folder)
        name = str(folder.relative_to(directory))
        label = record.label if name == "." else name
        rate = record.config.learning_rate(1)
        status: Status = "running" if record.summary is None else "finished"
        entries.append(EntryRecord(name, label, record.label, learning_rate=rate))
        runs.append(RunEntry(name, record.config.seed, rate, name, status))
    names = tuple(entry.name for entry in entries)
    title = entries[0].label if len(entries) == 1 else directory.resolve().name
    seeds = tuple(sorted({run.seed for run in runs}))
    question = Question("The run" if len(entries) == 1 else "The runs", names)
    return SuiteRecord(title, "nothing", seeds, tuple(entries), tuple(runs), (question,))
