"""Run a suite: choose the next runs and start them, a few processes at a time; resumable."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from types import FrameType

from steplm.checkpoint.folder import complete_checkpoints
from steplm.compare.display import SuiteDisplay
from steplm.compare.entries import Entry, RunKey, Suite
from steplm.compare.lock import RUNS_LOCK, exclusive
from steplm.compare.progress import Clock, LogTail
from steplm.compare.scores import evaluations, is_scored
from steplm.compare.sharing import Start, is_needed, next_start
from steplm.compare.suite import dump_suite
from steplm.compare.tuning import Choice, best, between, beyond, choose
from steplm.config import RunConfig
from steplm.errors import SteplmError
from steplm.files import write_atomically
from steplm.report.documents import Summary, read_document
from steplm.report.suite import RunEntry, SuiteRecord, is_suite, load_suite, save_suite
from steplm.training.branch import stage_end, stage_keys
from steplm.training.checks import is_same_run

TICK_SECONDS = 0.25
SETTLED = ("finished", "diverged", "failed")


@dataclass
class Job:
    """A running process."""

    run: RunKey
    process: ForkServerProcess
    answer: connection.Connection
    tail: LogTail


class Runner:
    """Runs a suite; ``record`` is the current content of ``suite.json``."""

    def __init__(
        self, suite: Suite, configs: Mapping[RunKey, RunConfig], display: SuiteDisplay, *, jobs: int | None = None
    ) -> None:
        """``configs`` has the configuration of every run that the suite may need, with its data folder."""
        self.suite, self.configs, self.display = suite, configs, display
        self.directory = suite.directory
        self.num_jobs = jobs or suite.config.jobs
        self.jobs: dict[RunKey, Job] = {}
        self.runs: dict[RunKey, RunEntry] = {}
        self.choices: dict[str, Choice | None] = {}  # None: every run of the entry's grid diverged
        self.stop_signal: int | None = None
        self._asked_twice = self._passed_on = False
        self._clock = Clock()
        self.stage_keys = all_stage_keys(suite, configs)

    def run(self) -> SuiteRecord:
        """Run everything unfinished; return when all runs have ended, or a signal has stopped them."""
        with exclusive(self.directory, self.display.waiting_for_runs), self._stopping_on_signals():
            earlier = load_suite(self.directory).runs if is_suite(self.directory) else ()
            self._before = {run.dir: run for run in earlier}
            write_atomically(self.directory / "suite.yaml", dump_suite(self.suite.config))
            self._update()
            self._remove_checkpoints()  # in case an earlier process was killed before it could
            with self.display:
                while self._start_runs() or self.jobs:
                    connection.wait([job.process.sentinel for job in self.jobs.values()], TICK_SECONDS)
                    self._pass_on_signal()
                    for job in [job for job in self.jobs.values() if not job.process.is_alive()]:
                        self._end(job)
                    self._show()
        return self.record

    @property
    def record(self) -> SuiteRecord:
        config = self.suite.config
        entries = []
        for entry in self.suite.entries.values():
            choice = self.choices.get(entry.name)
            entries.append(entry.record if choice is None else replace(entry.record, **asdict(choice)))
        return SuiteRecord(
            name=config.name,
            match=config.match,
            seeds=tuple(config.seeds),
            entries=tuple(entries),
            runs=tuple(self.runs.values()),
            questions=self.suite.questions,
            grid=tuple(sorted({rate for entry in self.suite.entries.values() for rate in self._grid(entry)})),
            tune_seed=self.suite.tune_seed,
            finalists=max((entry.finalists for entry in self.suite.entries.values()), default=1),
            baseline=config.baseline,
        )

    # Listing the runs

    def _update(self) -> None:
        """Choose the learning rates that can be chosen, list the resulting runs, and save both."""
        entries, before = self.suite.entries.values(), (-1, -1)
        # Repeat until nothing changes: on a restart, the runs that a choice adds may be finished and allow another.
        while before != (before := (len(self.choices), len(self.runs))):
            for entry in entries:
                self._choose_rate(entry)
            listed = {run: None for entry in entries for run in self._runs_of(entry)}
            self.runs = {run: self.runs.get(run) or self._first_record(run) for run in listed}
        save_suite(self.record, self.directory)

    def _runs_of(self, entry: Entry) -> Iterator[RunKey]:
        grid = self._grid(entry)
        for rate in grid:
            yield RunKey(entry.name, self.suite.tune_seed, rate)
        if entry.finalists > 1:
            for rate in best(self._losses(entry, grid) or {}, entry.finalists):
                for seed in entry.seeds:
                    yield RunKey(entry.name, seed, rate)
        if (choice := self.choices.get(entry.name)) is not None:
            for seed in entry.seeds:
                yield RunKey(entry.name, seed, choice.learning_rate)

    def _choose_rate(self, entry: Entry) -> None:
        if entry.name in self.choices:
            return
        if entry.rate_of is not None:
            if entry.rate_of in self.choices:
                choice = self.choices[entry.rate_of]
                self.choices[entry.name] = choice and replace(choice, at_edge=False)
            return
        if not entry.grid:
            self.choices[entry.name] = Choice(self.suite.fixed_rate(entry))
            return
        losses = self._losses(entry, self._grid(entry))
        if losses is None:
            return
        means = None
        if entry.finalists > 1:
            of_rates = {rate: self._mean_loss(entry, rate) for rate in best(losses, entry.finalists)}
            if any(mean is None for mean in of_rates.values()):
                return
            means = {rate: mean for rate, mean in of_rates.items() if mean is not None}
        self.choices[entry.name] = choose(losses, means)
        self.display.chosen(entry.name, losses, self.choices[entry.name])

    def _grid(self, entry: Entry) -> tuple[float, ...]:
        """The grid, plus the rates beyond an edge and around the best that the results so far call for."""
        grid = entry.grid
        for _ in range(entry.extend):
            losses = self._losses(entry, grid)
            further = None if losses is None else beyond(losses)
            if further is None:
                break
            grid = (*grid, further)
        for _ in range(entry.refine):
            losses = self._losses(entry, grid)
            if losses is None:
                break
            grid = (*grid, *between(losses))
        return grid

    def _losses(self, entry: Entry, grid: Iterable[float]) -> dict[float, float | None] | None:
        """Final losses by learning rate (``None`` if diverged); ``None`` while a run is missing."""
        tried = {rate: self.runs.get(RunKey(entry.name, self.suite.tune_seed, rate)) for rate in grid}
        if any(run is None or run.status not in ("finished", "diverged") for run in tried.values()):
            return None
        return {rate: self._final_loss(run) for rate, run in tried.items() if run is not None}

    def _mean_loss(self, entry: Entry, rate: float) -> float | None:
        """Mean final loss over all seeds; infinite if one diverged, ``None`` while one is missing."""
        runs = [self.runs.get(RunKey(entry.name, seed, rate)) for seed in entry.seeds]
        if any(run is None or run.status not in ("finished", "diverged") for run in runs):
            return None
        losses = [self._final_loss(run) for run in runs if run is not None]
        return math.inf if None in losses else statistics.fmean(loss for loss in losses if loss is not None)

    def _final_loss(self, run: RunEntry) -> float | None:
        if run.status == "diverged":
            return None
        summary = read_document(Summary, self.directory / run.dir / "summary.json")
        return None if summary is None else summary["validation_loss"]

    def _first_record(self, run: RunKey) -> RunEntry:
        """A run's record with its status from disk: finished and diverged runs keep theirs, others run or resume."""
        before = self._before.get(run.dir)
        run_dir = self.directory / run.dir
        status, error = "waiting", None
        if self._is_finished(run):
            status = "finished"
        elif before is not None and before.status == "diverged" and is_same_run(self.configs[run]):
            status, error = "diverged", before.error  # with another configuration, retry it
        shared_from = before.shared_from if before is not None and run_dir.is_dir() else None
        return RunEntry(run.entry, run.seed, run.learning_rate, run.dir, status, error, shared_from)  # type: ignore[arg-type]

    def _is_finished(self, run: RunKey) -> bool:
        """Whether a run is trained and scored on every text; without its model, missing scores stay missing."""
        run_dir = self.directory / run.dir
        try:
            if read_document(Summary, run_dir / "summary.json") is None:
                return False
        except SteplmError:  # damaged: the run itself reports what to do
            return False
        done, has_model = evaluations(run_dir), (run_dir / "export").is_dir()
        return not has_model or all(is_scored(done, name, text) for name, text in self.suite.config.evaluate.items())

    # Processes

    def _start_runs(self) -> bool:
        """Start as many runs as allowed; return whether any was started."""
        started = False
        while len(self.jobs) < self.num_jobs and self.stop_signal is None:
            start = self._next_start()
            if start is None:
                break
            self._start(start)
            started = True
        return started

    def _next_start(self) -> Start[RunKey] | None:
        waiting = [run for run, entry in self.runs.items() if entry.status == "waiting"]
        folders = {run: complete_checkpoints(self.directory / run.dir / "checkpoints") for run in self.runs}
        names = {run: {path.name for path in found} for run, found in folders.items()}
        # A run that branched off itself lacks the ends of its first stages.
        ends = {
            run: [n for n in range(1, self.suite.plan(run).num_stages + 1) if stage_end(n) in names[run]]
            for run in names
        }
        return next_start(waiting, self.jobs, self.stage_keys, ends, [run for run in waiting if names[run]])

    def _start(self, start: Start[RunKey]) -> None:
        from steplm.compare.worker import Task, work

        run = start.run
        branch_from = None
        if start.source is not None:
            branch_from = (self.directory / start.source.dir, start.stage_index)
            self._set(run, shared_from=start.source.dir)
        task = Task(
            self._with_threads(self.configs[run]), self.suite.config.evaluate, self.directory / RUNS_LOCK, branch_from
        )
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work, args=(task, sender), name=run.dir)
        process.start()
        sender.close()
        self.jobs[run] = Job(run, process, receiver, LogTail(self.directory / run.dir / "metrics.jsonl"))
        self._set(run, status="running", error=None)
        begins = f", begins where {self.runs[run].shared_from} was" if self.runs[run].shared_from else ""
        self.display.note(f"start     {run.dir}{begins}", "dim")

    @cached_property
    def _context(self) -> multiprocessing.context.ForkServerContext:
        """Processes are forked from a server that has done nothing but imports: no threads, no device."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["steplm.compare.worker"])
        return context

    def _with_threads(self, config: RunConfig) -> RunConfig:
        """Divide the CPU cores among concurrent runs."""
        if config.train.num_threads is not None or "OMP_NUM_THREADS" in os.environ:
            return config
        share = max(1, (os.cpu_count() or 1) // self.num_jobs)
        return config.model_copy(update={"train": config.train.model_copy(update={"num_threads": share})})

    def _end(self, job: Job) -> None:
        job.process.join()
        outcome = None
        try:
            if job.answer.poll():
                outcome = job.answer.recv()
        except EOFError:
            pass
        job.answer.close()
        del self.jobs[job.run]
        status, error = ("failed", _cause(job.process.exitcode)) if outcome is None else (outcome.status, outcome.error)
        if self.stop_signal is not None and (outcome is None or status == "stopped"):
            status, error = "waiting", None
        elif status == "stopped":
            status, error = "failed", "stopped from outside"
        elif status == "again":
            self._set(job.run, status="waiting", shared_from=None)
            self.display.note(f"again     {job.run.dir}: the checkpoint to start from is lost ({error})", "yellow")
            return
        self._set(job.run, status=status, error=error)
        self.display.ended(self.runs[job.run], self.directory)
        self._update()
        self._remove_checkpoints()

    def _set(self, run: RunKey, **changes: object) -> None:
        self.runs[run] = replace(self.runs[run], **changes)  # type: ignore[arg-type]
        save_suite(self.record, self.directory)

    # Stages shared by several runs

    def _still_to_come(self) -> Iterator[RunKey]:
        for entry in self.suite.entries.values():
            # Once the rate is chosen, all runs are listed; until then, it can be any rate that tuning may reach.
            runs = [] if entry.name in self.choices else self.suite.possible_runs(entry, {})
            for run in dict.fromkeys([*runs, *(run for run in self.runs if run.entry == entry.name)]):
                if run not in self.runs or self.runs[run].status not in SETTLED:
                    yield run

    def _remove_checkpoints(self) -> None:
        """Remove those of finished and diverged runs that no further run can branch off from."""
        if self.suite.config.keep_checkpoints:
            return
        to_come = list(self._still_to_come())
        for run, entry in self.runs.items():
            folder = self.directory / run.dir / "checkpoints"
            gone = folder.with_name(".checkpoints.gone")  # renamed first, so that half a checkpoint is never read
            shutil.rmtree(gone, ignore_errors=True)
            is_over = entry.status in ("finished", "diverged") and folder.is_dir()
            if is_over and not is_needed(run, to_come, self.stage_keys):
                os.replace(folder, gone)
                shutil.rmtree(gone, ignore_errors=True)

    # Signals and display

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """The first signal asks every run to save and stop; the second kills them."""

        def ask(signum: int, frame: FrameType | None) -> None:
            self._asked_twice = self.stop_signal is not None
            self.stop_signal = signum

        before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            for job in self.jobs.values():  # an error here must leave no run behind
                job.process.terminate()

    def _pass_on_signal(self) -> None:
        if self.stop_signal is None:
            return
        if self._asked_twice:
            for job in self.jobs.values():
                job.process.kill()
        elif not self._passed_on:
            self._passed_on = True
            runs = f"{len(self.jobs)} run{'s' * (len(self.jobs) != 1)}"
            self.display.note(f"stopping: {runs} will save and end; again to kill", "yellow")
            for job in self.jobs.values():
                job.process.terminate()

    def _show(self) -> None:
        done = 0.0
        rows = []
        for run, job in self.jobs.items():
            event = job.tail.read()
            plan = self.suite.plan(run)
            if event is not None:
                done += plan.training_flops * event["tokens_seen"] / plan.total_tokens
            rows.append((run.dir, event, plan))
        done += sum(self.suite.plan(run).training_flops for run, e in self.runs.items() if e.status in SETTLED)
        chosen = {name: None if choice is None else choice.learning_rate for name, choice in self.choices.items()}
        expected = self.suite.expected_runs(chosen, self.runs)
        total = sum(self.suite.plan(run).training_flops for run in expected)
        self.display.update(list(self.runs.values()), len(expected), rows, self._clock.seconds_left(done, total))


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = ", perhaps for lack of memory" if -exit_code == signal.SIGKILL else ""
        return f"its process was killed by {name}{hint}"
    return f"its process ended with exit code {exit_code} and no message"


def problems_of(record: SuiteRecord) -> list[str]:
    """Problems of a finished suite: failed runs, and entries without a learning rate or a result."""
    lines = [f"{run.dir}: {run.error}" for run in record.runs if run.status == "failed"]
    for entry in record.entries:
        counting = {run.status for run in record.runs_of(entry.name)}
        if entry.learning_rate is None:
            lines.append(f"entry {entry.name!r} has no learning rate: at every rate a run diverged or failed")
        elif counting == {"diverged"}:
            lines.append(f"entry {entry.name!r} has no result: every run of it diverged")
    return lines


def all_stage_keys(suite: Suite, configs: Mapping[RunKey, RunConfig]) -> dict[RunKey, tuple[str, ...]]:
    """One key per stage of every run; stages with equal keys end in equal checkpoints."""
    return {run: stage_keys(config, suite.plan(run)) for run, config in configs.items()}
