"""Reads ``suite.yaml`` into a ``SuiteConfig``: validated as the user wrote it, with nothing derived.

Environment variables are expanded as in ``run.yaml``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from steplm.compare.methods import METHODS
from steplm.config import FOLDER_NAME, Count, RunConfig, Section, Texts, read_values, recipes_dir
from steplm.errors import ConfigError
from steplm.planner.auto import load_config
from steplm.problems import sections_of, validated
from steplm.sft.config import SftConfig
from steplm.units import nearest, shortened
from steplm.yaml_files import dump_yaml, read_yaml

Match = Literal["tokens", "flops"]
Rates = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=100)]
Repeats = Annotated[int, Field(ge=0, le=8)]  # each `refine` step can double the grid
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
MOST_COMBINATIONS = 1000
SET_BY_THE_SUITE = ("name", "output_dir", "seed")


class TuneConfig(Section):
    """The grid of learning rates for every tuned entry, at one seed, and how to choose from it."""

    learning_rates: Rates
    extend: Repeats = Field(
        0, description="while the best rate is at an edge: how often to add a rate beyond it, by the grid's ratio"
    )
    refine: Repeats = Field(0, description="then: how often to add rates halfway between the best and its neighbors")
    finalists: int = Field(1, gt=0, description="number of best rates that all seeds run at; the best mean wins")
    seed: Seed = 0


class TextConfig(Section):
    """A text that every finished model is scored on."""

    data: Texts
    max_tokens: Count | None = None
    text_field: str = "text"


class EntryConfig(Section):
    """One method with its settings, or several entries if ``vary`` is given."""

    name: str = Field(pattern=FOLDER_NAME, max_length=100)
    method: str | None = Field(None, description=f"one of {', '.join(METHODS)}")
    like: str | None = Field(None, description="an entry above, whose settings and learning rate this one takes")
    label: str | None = None
    match: Match | None = Field(None, description="default: the suite's")
    set: dict[str, Any] = Field(default_factory=dict, description="configuration keys and their values")
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description="keys and lists of values: one entry NAME=VALUE for each combination"
    )
    tune: bool | None = Field(None, description="default: true if the suite has a grid and there is no `like`")
    seeds: Seeds | None = None
    learning_rates: Rates | None = Field(None, description="this entry's own grid")

    @model_validator(mode="after")
    def _consistent(self) -> EntryConfig:
        if (self.method is None) == (self.like is None):
            raise ValueError("give either a method or, with `like`, the name of an entry above")
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"no method {self.method!r}.{nearest(self.method, METHODS)}")
        for key in (*self.set, *self.vary):
            if key in SET_BY_THE_SUITE:
                raise ValueError(f"{key!r} is set by the suite, for each run")
            if key in sections_of(RunConfig):
                raise ValueError(f"{key!r} would reset every key of the section: give those that change, {key}.KEY")
        if (num_combinations := math.prod(map(len, self.vary.values()))) > MOST_COMBINATIONS:
            raise ValueError(f"`vary` makes {num_combinations:,} entries; {MOST_COMBINATIONS:,} are the most")
        twice = sorted(self.set.keys() & self.vary.keys())
        if twice:
            raise ValueError(f"both `set` and `vary` have {', '.join(twice)}")
        return self


class QuestionConfig(Section):
    """Entries that the report compares; they may be shell patterns such as ``position=*``."""

    title: str
    text: str = ""
    entries: Annotated[list[str], Field(min_length=1)]
    baseline: str | None = Field(None, description="default: the suite's, where it is among the entries")


class TasksConfig(Section):
    """Zero-shot tasks, as ``steplm eval --tasks`` scores them."""

    names: Annotated[Texts, Field(min_length=1)]
    data: str | None = Field(None, description="folder with local copies of sets")
    paths: Texts = Field([], description="folders of task files")
    limit: int | None = Field(None, gt=0, description="items of each task, the first ones")
    num_fewshot: int | None = Field(None, ge=0)
    batch_size: int = Field(8, gt=0)


class InstructionsConfig(SftConfig):
    """Instruction tuning: the keys of ``steplm sft``, and its data."""

    data: Annotated[Texts, Field(min_length=1)]

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        """Omit defaults: some keys exclude others, and a saved suite must load again."""
        return {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}

    @property
    def keys(self) -> SftConfig:
        """The settings of ``instruction_tune``, without the data."""
        return SftConfig.model_validate({key: value for key, value in self.model_dump().items() if key != "data"})


class MtBenchConfig(Section):
    """MT-Bench: the options of ``steplm mtbench``, with its defaults."""

    data: str
    judge_model: str
    questions: str | None = None
    base_url: str | None = None
    mode: Literal["single", "pairwise", "both"] = "single"
    categories: Texts = Field([])
    limit: int | None = Field(None, gt=0, description="questions of each category")
    max_new_tokens: int = Field(1024, gt=0)
    batch_size: int = Field(8, gt=0)
    seed: int = 0
    chat_template: str | None = None
    api_key_env: str | None = None
    concurrency: int = Field(4, gt=0)
    requests_per_minute: float | None = Field(None, gt=0)
    timeout: float = Field(120.0, gt=0)
    retries: int = Field(6, ge=0)
    backoff: float = Field(1.0, ge=0)
    ask_again: int = Field(2, ge=0)
    max_judge_tokens: int = Field(2048, gt=0)
    rating: Literal["first", "last"] = "first"


class AfterwardsConfig(Section):
    """Tuning and evaluation after the last run, for each entry's model at the chosen learning rate."""

    entries: Annotated[Texts, Field(min_length=1)] = Field(["*"], description="names or shell patterns")
    seeds: Seeds | None = Field(None, description="default: the first of each entry's")
    tasks: TasksConfig | None = None
    sft: InstructionsConfig | None = None
    mtbench: MtBenchConfig | None = Field(None, description="of the tuned models, where there is `sft`")

    @model_validator(mode="after")
    def _consistent(self) -> AfterwardsConfig:
        if not (self.tasks or self.sft or self.mtbench):
            raise ValueError("nothing to do: give `tasks`, `sft` or `mtbench`")
        if self.mtbench and not self.mtbench.chat_template and (not self.sft or self.sft.chat_template == "none"):
            raise ValueError(
                "`mtbench` talks with models, and what a suite trains has no chat template: give `sft` with one, which "
                "is the default, or mtbench.chat_template"
            )
        return self


class SuiteConfig(Section):
    """A suite of runs."""

    name: str = Field(pattern=FOLDER_NAME)
    run: str | dict[str, Any] = Field(description="recipe, path or sections: the configuration that all runs share")
    output_dir: str | None = Field(None, description="default: runs/suites/NAME")
    match: Match = Field("tokens", description="what every run shares with the baseline: tokens or flops")
    baseline: str
    seeds: Seeds = Field([0])
    tune: TuneConfig | None = None
    jobs: int = Field(1, gt=0, description="runs side by side")
    evaluate: dict[str, TextConfig] = Field(default_factory=dict)
    afterwards: AfterwardsConfig | None = None
    keep_checkpoints: bool = Field(False, description="false: removed once no further run needs them")
    entries: Annotated[list[EntryConfig], Field(min_length=1)]
    questions: list[QuestionConfig] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> SuiteConfig:
        if "validation" in self.evaluate:
            raise ValueError("evaluate: 'validation' is the text of the runs themselves. Give this one another name")
        return self

    @property
    def directory(self) -> Path:
        return Path(self.output_dir or f"runs/suites/{self.name}")


def read_suite(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> SuiteConfig:
    """Read a suite, and replace ``run`` by the full configuration of the run that it is based on.

    Args:
        source: path of a YAML file, name of a shipped suite, or nested mappings.
        overrides: ``section.key=value`` strings for the base run.

    Raises:
        ConfigError: lists all problems at once, each with its path and, for unknown keys, the nearest known key.
    """
    values = dict(source) if isinstance(source, Mapping) else read_yaml(_find_suite(source))
    if "model" in values and "entries" not in values:
        raise ConfigError(f"{source} is a run, not a suite: `steplm train {source}`", path=str(source))
    suite = validated(SuiteConfig, values, "the suite")
    written = read_values(suite.run, overrides)
    run = load_config(written).model_dump(mode="json")
    if (written.get("optim") or {}).get("learning_rate", "auto") == "auto":
        run["optim"]["learning_rate"] = "auto"  # each entry has the default of its own method, rule and width
    return suite.model_copy(update={"run": run})


def dump_suite(suite: SuiteConfig) -> str:
    """YAML text that ``read_suite`` reads back to an equal suite."""
    return dump_yaml(suite.model_dump(mode="json", exclude_none=True))


def _find_suite(source: str | Path) -> Path:
    """The path of a YAML file, or of the shipped suite with that name."""
    folder = recipes_dir() / "suites"
    for path in (Path(source), folder / f"{source}.yaml", recipes_dir() / f"{source}.yaml"):
        if os.path.isfile(path):
            return path
    names = sorted(suite.stem for suite in folder.glob("*.yaml"))
    hint = nearest(Path(source).stem, names, otherwise=f" Suites: {', '.join(names)}.")
    raise ConfigError(f"no file {shortened(str(source), 300)}.{hint}", path=str(source))
