"""Zero-shot evaluation with lm_eval; each pair of model and task is saved as soon as it is scored, and reused.

The JSON document of the results (``ZeroShotResults.as_json``), schema 1::

    {"schema": 1, "kind": "zero_shot", "lm_eval": VERSION, "limit": N or null,
     "models": [{"model": PATH, "label": SHORT NAME}, …],             the first is the baseline
     "tasks": [{"task", "version", "num_fewshot", "num_items", "chance": SHARE or null,
                "num_truncated": [N per model], "primary_metric": NAME or null,
                "metrics": {NAME: {"higher_is_better", "aggregation",
                                   "scores": [{"value", "stderr"} per model],
                                   "differences": [null, {"value", "low", "high"}, …]}}}, …],
     "average": {"scores": […], "differences": […], "tasks": [NAMES]} or null}

Shares are between 0 and 1; ``low`` and ``high`` bound a 95% interval; non-finite numbers are null.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steplm.data.tokenizer import load_tokenizer
from steplm.errors import ConfigError
from steplm.eval.bootstrap import Difference, mean_difference
from steplm.eval.fingerprint import model_fingerprint
from steplm.eval.scores import TaskResult, difference, load, mean_of, save
from steplm.eval.task_list import TaskFolders, check_names, load_tasks
from steplm.models.device import resolve_device
from steplm.models.folder import load_for_inference
from steplm.models.names import short_name, short_names

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from steplm.eval.harness import Scorer

SCHEMA = 1
ITEMS_FOLDER = "items"


class Progress(Protocol):
    """Callbacks that report the progress of an evaluation."""

    def begin(self, model: str, task: str) -> None: ...

    def advance(self, done: int, total: int) -> None: ...

    def finish(self, result: TaskResult, reused: bool) -> None: ...


@dataclass(frozen=True)
class ZeroShotResults:
    """Results of every model on every task; the first model is the baseline."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    by_model_and_task: dict[tuple[str, str], TaskResult]
    lm_eval_version: str
    names: tuple[str, ...] = ()  # model names in tables; default: the ends of their paths

    def of(self, task: str) -> list[TaskResult]:
        """Results on a task, in the order of ``models``."""
        return [self.by_model_and_task[model, task] for model in self.models]

    @cached_property
    def labels(self) -> dict[str, str]:
        """A short name for each model."""
        return dict(zip(self.models, self.names or short_names(self.models), strict=True))

    @cached_property
    def _differences(self) -> dict[tuple[str, str, str], Difference | None]:
        return {
            (model, task, metric): difference(
                self.by_model_and_task[model, task], self.by_model_and_task[self.models[0], task], metric
            )
            for model in self.models[1:]
            for task in self.tasks
            for metric in self.by_model_and_task[model, task].metrics
        }

    def difference(self, model: str, task: str, metric: str) -> Difference | None:
        """A model minus the baseline, over the same items; ``None`` for the baseline, or without per-item scores."""
        return None if model == self.models[0] else self._differences[model, task, metric]

    @cached_property
    def averaged(self) -> dict[str, str]:
        """Tasks in the average, with the metric of each; empty if there are fewer than two."""
        primary = {task: self.of(task)[0].primary_metric for task in self.tasks}
        chosen = {task: metric for task, metric in primary.items() if metric is not None}
        return chosen if len(chosen) > 1 else {}

    def average(self, model: str) -> tuple[float, float | None]:
        """Mean and standard error over ``averaged``; every task has equal weight, however many items it has."""
        metrics = [self.by_model_and_task[model, task].metrics[name] for task, name in self.averaged.items()]
        return mean_of([(metric.value, metric.stderr) for metric in metrics])

    def average_difference(self, model: str) -> Difference | None:
        """A model's average minus the baseline's; ``None`` for the baseline, or if a task has no difference."""
        parts = [self.difference(model, task, metric) for task, metric in self.averaged.items()]
        return mean_difference([p for p in parts if p is not None]) if parts and None not in parts else None

    def as_json(self) -> dict[str, Any]:
        """The JSON document described in the module docstring."""
        return {
            "schema": SCHEMA,
            "kind": "zero_shot",
            "lm_eval": self.lm_eval_version,
            "limit": self.of(self.tasks[0])[0].limit,
            "models": [{"model": model, "label": self.labels[model]} for model in self.models],
            "tasks": [self._task_as_json(task) for task in self.tasks],
            "average": {
                "scores": [_score(*self.average(model)) for model in self.models],
                "differences": [_bounds(self.average_difference(model)) for model in self.models],
                "tasks": list(self.averaged),
            }
            if self.averaged
            else None,
        }

    def _task_as_json(self, task: str) -> dict[str, Any]:
        results = self.of(task)
        first = results[0]
        return {
            "task": task,
            "version": first.version,
            "num_fewshot": first.num_fewshot,
            "num_items": first.num_items,
            "chance": first.chance,
            "num_truncated": [result.num_truncated for result in results],
            "primary_metric": first.primary_metric,
            "metrics": {
                name: {
                    "higher_is_better": metric.higher_is_better,
                    "aggregation": metric.aggregation,
                    "scores": [_score(r.metrics[name].value, r.metrics[name].stderr) for r in results],
                    "differences": [_bounds(self.difference(model, task, name)) for model in self.models],
                }
                for name, metric in first.metrics.items()
            },
        }


def evaluate_tasks(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    tasks_path: Sequence[str | Path] = (),
    tasks_data: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    names: Sequence[str] = (),
    progress: Progress | None = None,
) -> ZeroShotResults:
    """Score models on tasks; a model's own code is never run (``trust_remote_code`` stays off).

    Args:
        models: Hugging Face folders or hub names; the first is the baseline.
        tasks: names, as in lm_eval; groups and tags stand for their tasks.
        limit: number of items per task, from the first; default: all.
        num_fewshot: solved examples before each item; default: the task's own number.
        batch_size: requests per forward pass.
        tasks_path: folders of lm_eval task files, searched before lm_eval's own. Python functions named
            (``!function``) in the files of the requested tasks are run.
        tasks_data: folder with local copies of the datasets that ``steplm/eval/tasks`` describes; those tasks then
            need no network.
        output: folder where each pair of model and task is saved once scored. A result is reused if the weights,
            tokenizer, precision, items, few-shot examples and lm_eval version are the same.
        device, dtype: as in ``evaluate_folder``.
        names: model names in tables; default: the ends of their paths.

    Raises:
        ConfigError: lm_eval is not installed, a task is unknown, a number is out of range, or a model is not causal.
        CheckpointError, DataError, HubUnavailable: a model, tokenizer or dataset is missing or unusable.
    """
    paths = [str(model) for model in models]
    _check(paths, names, tasks, limit, num_fewshot, batch_size)
    resolve_device(device)
    require_lm_eval()
    check_names(tasks, _folders(tasks_path, tasks_data))
    fingerprints = {path: model_fingerprint(path) for path in paths}  # a wrong name fails before minutes of work
    loaded = tasks_of(tasks, num_fewshot=num_fewshot, tasks_path=tasks_path, tasks_data=tasks_data)

    import lm_eval

    from steplm.eval.harness import score, task_key

    keys = {name: task_key(task, limit) for name, task in loaded.items()}
    results: dict[tuple[str, str], TaskResult] = {}
    for model in paths:
        lm: Scorer | None = None
        for name, task in loaded.items():
            fingerprint = hashlib.sha256(f"{fingerprints[model]} {keys[name]} {dtype}".encode()).hexdigest()
            file = None if output is None else Path(output) / ITEMS_FOLDER / _file_name(model, name, fingerprint)
            if progress is not None:
                progress.begin(model, name)
            result = None if file is None else load(file, fingerprint)
            reused = result is not None
            if result is None:
                lm = lm or _load_scorer(model, batch_size, device, dtype)
                if progress is not None:
                    lm.advance = progress.advance
                started_at = time.monotonic()
                result = score(lm, name, task, limit)
                result = replace(result, model=model, seconds=round(time.monotonic() - started_at, 3))
                if file is not None:
                    save(result, file, fingerprint)
            results[model, name] = replace(result, model=model)
            if progress is not None:
                progress.finish(results[model, name], reused)
    return ZeroShotResults(tuple(paths), tuple(loaded), results, lm_eval.__version__, tuple(names))


def tasks_of(
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    tasks_path: Sequence[str | Path] = (),
    tasks_data: str | Path | None = None,
) -> dict[str, Task]:
    """Load tasks with their items; arguments and errors as in ``evaluate_tasks``."""
    require_lm_eval()
    folders = _folders(tasks_path, tasks_data)
    check_names(tasks, folders)
    return load_tasks(list(dict.fromkeys(tasks)), folders, num_fewshot)


def _folders(tasks_path: Sequence[str | Path], tasks_data: str | Path | None) -> TaskFolders:
    return TaskFolders(tuple(map(Path, tasks_path)), None if tasks_data is None else Path(tasks_data))


def _load_scorer(model: str, batch_size: int, device: str, dtype: str) -> Scorer:
    from steplm.eval.harness import scorer

    return scorer(load_for_inference(model, device, dtype=dtype), load_tokenizer(model), batch_size)


def _file_name(model: str, task: str, fingerprint: str) -> str:
    plain = re.sub(r"[^\w.-]+", "_", f"{task}-{short_name(model)}")
    return f"{plain[:100]}-{fingerprint[:12]}.json"


def _check(
    models: Sequence[str],
    names: Sequence[str],
    tasks: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
) -> None:
    if not models or not tasks:
        raise ConfigError("an evaluation needs at least one model and one task")
    if twice := [model for model in dict.fromkeys(models) if models.count(model) > 1]:
        raise ConfigError(f"{twice[0]} is named twice: each model once", model=twice[0])
    if names and (len(names) != len(models) or len(set(names)) < len(names)):
        raise ConfigError(
            f"{len(models)} models, but {len(set(names))} different names: give one for each model, or none"
        )
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}, but must be {least} or more", **{name: value})


def require_lm_eval() -> None:
    """Raise ``ConfigError`` if lm_eval cannot be imported."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tasks are scored by lm_eval, which cannot be imported ({error}). Install it: pip install '.[eval]'"
        ) from None


def _score(value: float, stderr: float | None) -> dict[str, float | None]:
    return {"value": _finite(value), "stderr": _finite(stderr)}


def _bounds(gap: Difference | None) -> dict[str, float | None] | None:
    return None if gap is None else {"value": _finite(gap.value), "low": _finite(gap.low), "high": _finite(gap.high)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
