"""Expands a ``SuiteConfig`` into entries, and the configuration and plan of every run that they can lead to."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from steplm.compare.methods import METHODS
from steplm.compare.suite import EntryConfig, SuiteConfig
from steplm.compare.tuning import reachable
from steplm.config import RunConfig, token_budget
from steplm.errors import ConfigError
from steplm.planner.auto import load_config
from steplm.planner.plan import Plan
from steplm.planner.plan import plan as make_plan
from steplm.report.suite import EntryRecord, Question
from steplm.units import nearest


@dataclass(frozen=True, kw_only=True)
class Entry(EntryRecord):
    """One method with its settings (a curve in a figure, a row in a table), and how its learning rate is found."""

    grid: tuple[float, ...]  # (): not tuned
    extend: int  # times the grid may grow beyond an edge, while the best rate is there
    refine: int  # times the grid grows between the best rate and its neighbors
    finalists: int  # number of best rates that all seeds run at
    rate_of: str | None  # the entry whose learning rate this one uses

    @property
    def reachable_rates(self) -> tuple[float, ...]:
        """Every learning rate that tuning can try."""
        return reachable(self.grid, self.extend, self.refine)

    @property
    def record(self) -> EntryRecord:
        """The entry as in ``suite.json``, before a learning rate is chosen."""
        return EntryRecord(**{field.name: getattr(self, field.name) for field in fields(EntryRecord)})


class RunKey(NamedTuple):
    """One run of a suite."""

    entry: str
    seed: int
    learning_rate: float

    @property
    def dir(self) -> str:
        """The run directory, relative to the suite's."""
        return f"runs/{self.entry}/lr{self.learning_rate:g}-seed{self.seed}"


class Suite:
    """The entries of a suite, and the configuration and plan of their runs."""

    def __init__(self, config: SuiteConfig) -> None:
        self.config = config
        self.directory = config.directory
        self.entries = {entry.name: entry for entry in _expand(config)}
        if config.baseline not in self.entries:
            raise ConfigError(f"baseline: no entry {config.baseline!r}.{nearest(config.baseline, self.entries)}")
        self.questions = tuple(_questions(config, list(self.entries)))
        self.last_models = _last_models(config, self.entries)
        self.tune_seed = config.tune.seed if config.tune else 0
        self.run_config, self._plan_of = cache(self._run_config), cache(self._plan)

    def fixed_rate(self, entry: Entry) -> float:
        """The configured learning rate of an entry that is not tuned.

        Raises:
            ConfigError: the entry has one rate per stage; a suite compares runs at a single rate.
        """
        rate = _configured(entry, self._base, {}).optim.learning_rate
        if isinstance(rate, list):
            raise ConfigError(
                f"optim.learning_rate is {rate}: a suite compares runs at one learning rate each. Give one number."
            )
        return rate

    @property
    def _base(self) -> dict[str, Any]:
        assert isinstance(self.config.run, dict), "read_suite puts the base's sections here"
        return self.config.run

    def possible_rates(self, entry: Entry, chosen: Mapping[str, float | None]) -> tuple[float, ...]:
        """Learning rates that the seeds of an entry may run at; exactly one once it is chosen."""
        rate = chosen.get(entry.name)
        if rate is not None:
            return (rate,)
        if entry.rate_of is not None:
            return self.possible_rates(self.entries[entry.rate_of], chosen)
        return entry.reachable_rates or (self.fixed_rate(entry),)

    def possible_runs(self, entry: Entry, chosen: Mapping[str, float | None]) -> Iterator[RunKey]:
        """Every run that an entry can lead to, given the rates already chosen."""
        runs = [RunKey(entry.name, self.tune_seed, rate) for rate in entry.reachable_rates]
        rates = self.possible_rates(entry, chosen)
        runs += [RunKey(entry.name, seed, rate) for seed in entry.seeds for rate in rates]
        yield from dict.fromkeys(runs)

    def expected_runs(self, chosen: Mapping[str, float | None], known: Collection[RunKey] = ()) -> list[RunKey]:
        """The fewest runs that the suite can end up with, at a placeholder rate where none is chosen yet.

        Args:
            known: runs that exist, including those of an extended or refined grid.
        """
        return [run for entry in self.entries.values() for run in self._expected_runs_of(entry, chosen, known)]

    def _expected_runs_of(
        self, entry: Entry, chosen: Mapping[str, float | None], known: Collection[RunKey]
    ) -> Iterator[RunKey]:
        own = [run for run in known if run.entry == entry.name]
        runs = [*own, *(RunKey(entry.name, self.tune_seed, rate) for rate in entry.grid)]
        rates = self.possible_rates(entry, chosen)[:1]
        if entry.grid and chosen.get(entry.name) is None:
            begun = dict.fromkeys(run.learning_rate for run in own if run.seed != self.tune_seed)
            rates = tuple(dict.fromkeys([*begun, *entry.grid]))[: entry.finalists]
        yield from dict.fromkeys([*runs, *(RunKey(entry.name, seed, rate) for rate in rates for seed in entry.seeds)])

    def _run_config(self, run: RunKey) -> RunConfig:
        entry = self.entries[run.entry]
        values: dict[str, Any] = {
            "name": re.sub(r"[^\w.\-]", "-", f"{run.entry}-{Path(run.dir).name}"),
            "output_dir": str(self.directory / run.dir),
            "seed": run.seed,
            "optim.learning_rate": run.learning_rate,
        }
        if entry.match == "flops" and entry.name != self.config.baseline:
            values |= token_budget(total_flops=self.plan(self.baseline_run(run.seed)).training_flops)
        return _configured(entry, self._base, values)

    def plan(self, run: RunKey) -> Plan:
        """The plan of a run; it does not depend on the learning rate."""
        return self._plan_of(run.entry, run.seed)

    def _plan(self, entry: str, seed: int) -> Plan:
        config = self.run_config(RunKey(entry, seed, self.possible_rates(self.entries[entry], {})[0]))
        from steplm.models.shape import shape_of

        return make_plan(config, shape_of(config.model.hf_config()))

    def baseline_run(self, seed: int) -> RunKey:
        """The run that others are matched against; its plan is the same for every learning rate."""
        baseline = self.entries[self.config.baseline]
        return RunKey(baseline.name, seed, self.possible_rates(baseline, {})[0])


def _configured(entry: Entry, base: Mapping[str, Any], values: Mapping[str, Any]) -> RunConfig:
    settings = {**METHODS[entry.method].settings, **entry.settings, **values}
    try:
        return load_config(base, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    except ConfigError as error:
        raise ConfigError(f"entry {entry.name!r}: {error}", entry=entry.name, **error.details) from None


def _expand(config: SuiteConfig) -> Iterator[Entry]:
    known: dict[str, Entry] = {}
    for written in config.entries:
        for name, varied in _combinations(written):
            if name in known:
                raise ConfigError(f"two entries are called {name!r}. Names are folders: give each its own.", name=name)
            known[name] = _entry(config, written, name, varied, known)
            yield known[name]


def _combinations(written: EntryConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of each combination of the varied values."""
    for values in product(*written.vary.values()):
        suffix = ",".join(map(_as_name, values))
        yield f"{written.name}={suffix}" if values else written.name, dict(zip(written.vary, values, strict=True))


def _as_name(value: Any) -> str:
    """Format a value for a folder name."""
    is_negative = isinstance(value, int | float) and value < 0
    return "-" * is_negative + re.sub(r"[^\w.]+", "-", str(value)).strip("-")


def _entry(
    config: SuiteConfig, written: EntryConfig, name: str, varied: dict[str, Any], known: Mapping[str, Entry]
) -> Entry:
    like = None
    if written.like is not None:
        if written.like not in known:
            raise ConfigError(
                f"entry {name!r}: like: no entry {written.like!r} above it.{nearest(written.like, known)}", entry=name
            )
        like = known[written.like]
    method = written.method or (like.method if like else "")
    own = {**written.set, **varied}
    own_grid = written.learning_rates is not None
    if own_grid and written.tune is False:
        raise ConfigError(f"entry {name!r} has learning_rates, and tune: false. Leave one out.", entry=name)
    tuned = own_grid or (bool(config.tune and like is None) if written.tune is None else written.tune)
    grid = written.learning_rates or (config.tune.learning_rates if config.tune else [])
    if tuned and not grid:
        raise ConfigError(f"entry {name!r} is to be tuned, but neither it nor `tune` has learning_rates", entry=name)
    if tuned and "optim.learning_rate" in own:
        raise ConfigError(
            f"entry {name!r} sets optim.learning_rate and is tuned as well. Leave one out: with `tune: false` it is "
            "run at the rate that it sets.",
            entry=name,
        )
    match = written.match or config.match
    label = written.label or (like.label if like else METHODS[method].label)
    told = varied if written.label or not like else own  # settings that the label does not mention yet
    label += "".join(f", {key.rpartition('.')[2]} {value}" for key, value in told.items())
    if match != config.match and not written.label:
        label += f", equal {'FLOPs' if match == 'flops' else match}"
    takes_rate = like is not None and not tuned and "optim.learning_rate" not in own
    return Entry(
        name=name,
        label=label,
        method=method,
        like=written.like,
        match=match,
        settings={**(like.settings if like else {}), **own},
        tuned=tuned,
        seeds=tuple(dict.fromkeys(written.seeds or config.seeds)),
        grid=tuple(sorted(set(grid))) if tuned else (),
        extend=config.tune.extend if tuned and config.tune else 0,
        refine=config.tune.refine if tuned and config.tune else 0,
        finalists=config.tune.finalists if tuned and config.tune else 1,
        rate_of=written.like if takes_rate else None,
    )


def _questions(config: SuiteConfig, names: list[str]) -> Iterator[Question]:
    if not config.questions:
        yield Question("All entries", tuple(names), config.baseline)
    for question in config.questions:
        entries: dict[str, None] = {}
        for pattern in question.entries:
            entries |= dict.fromkeys(_matching(pattern, names, f"question {question.title!r}"))
        baseline = question.baseline or (config.baseline if config.baseline in entries else None)
        if baseline is not None and baseline not in names:
            raise ConfigError(f"question {question.title!r}: no entry {baseline!r}.{nearest(baseline, names)}")
        yield Question(question.title, tuple(entries), baseline, question.text)


def _matching(pattern: str, names: Collection[str], where: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(f"{where}: no entry {pattern!r}.{nearest(pattern, names)}")
    return found


def _last_models(config: SuiteConfig, entries: Mapping[str, Entry]) -> dict[str, tuple[Entry, int]]:
    """Entry and seed of each model that ``afterwards`` covers, by its name in tables; the baseline comes first."""
    if config.afterwards is None:
        return {}
    given = config.afterwards.seeds
    names = dict.fromkeys(n for p in config.afterwards.entries for n in _matching(p, entries, "afterwards.entries"))
    models = {}
    for name in sorted(names, key=lambda name: name != config.baseline):
        entry = entries[name]
        seeds = tuple(dict.fromkeys(given or entry.seeds[:1]))
        if missing := sorted({*seeds} - {*entry.seeds}):
            raise ConfigError(
                f"afterwards.seeds: entry {name!r} is not run at seed {missing[0]}, only at "
                f"{', '.join(map(str, entry.seeds))}"
            )
        for seed in seeds:
            label = name if len(seeds) == 1 else f"{name}-seed{seed}"
            models[re.sub(r"[^\w.=+-]", "_", label)] = entry, seed  # MT-Bench uses these as file names
    return models
