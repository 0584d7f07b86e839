"""A model's scores on a task, in memory and on disk."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from steplm.eval.bootstrap import Array, Difference, ItemScores, identity, paired_difference
from steplm.files import write_atomically
from steplm.types import from_json

SCHEMA = 1  # of the file for one model and task


@dataclass(frozen=True)
class Metric:
    """A metric aggregated over all items.

    Attributes:
        stderr: standard error of the value, if the metric is a mean or a perplexity.
        aggregation: how item scores are combined: ``mean``, ``perplexity`` (exp of the negative mean
            log-likelihood) or ``other``.
    """

    value: float
    stderr: float | None
    higher_is_better: bool
    aggregation: str

    @property
    def is_share(self) -> bool:
        """Whether this is an accuracy, or another mean between 0 and 1."""
        return self.aggregation == "mean" and 0 <= self.value <= 1


@dataclass(frozen=True)
class TaskResult:
    """Results of one model on one task.

    Attributes:
        chance: accuracy of random guessing, for a multiple-choice task.
        num_truncated: requests longer than the model's context, truncated on the left.
        item_ids: per item, a hash of what the model was asked.
        item_scores: per metric, one score per item.
        loglikelihoods: nats; per item, one per choice.
        seconds: time taken to score the task.
    """

    task: str
    version: str
    num_fewshot: int
    limit: int | None
    metrics: dict[str, Metric]
    chance: float | None
    num_truncated: int
    item_ids: tuple[str, ...]
    item_scores: dict[str, tuple[float, ...]]
    loglikelihoods: tuple[tuple[float, ...], ...] = field(repr=False)
    model: str = ""
    seconds: float = 0.0

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def primary_metric(self) -> str | None:
        """The metric used in averages and figures: ``acc_norm``, else ``acc``, else the first share."""
        shares = [name for name, metric in self.metrics.items() if metric.is_share and metric.higher_is_better]
        return next((name for name in ("acc_norm", "acc") if name in shares), shares[0] if shares else None)

    def scores_of(self, metric: str) -> ItemScores:
        """Per-item scores for a metric."""
        return ItemScores(self.item_ids, self.item_scores[metric])


def difference(ours: TaskResult, theirs: TaskResult, metric: str) -> Difference | None:
    """Ours minus theirs, with a 95% interval over the same items; ``None`` if the metric has no per-item scores.

    Raises:
        DataError: the items differ.
    """
    if metric not in ours.item_scores or metric not in theirs.item_scores:
        return None
    statistic = _exp_of_minus if ours.metrics[metric].aggregation == "perplexity" else identity
    return paired_difference(ours.scores_of(metric), theirs.scores_of(metric), statistic=statistic, seed=ours.task)


def _exp_of_minus(means: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(-means)


# --- one file per model and task --------------------------------------------------------------------------


def save(result: TaskResult, path: Path, fingerprint: str) -> None:
    """Write a result atomically; ``fingerprint`` identifies what it was computed from."""
    document = {"schema": SCHEMA, "fingerprint": fingerprint, **asdict(result)}
    write_atomically(path, json.dumps(document, ensure_ascii=False) + "\n")


def load(path: Path, fingerprint: str) -> TaskResult | None:
    """Read what ``save`` wrote; ``None`` if there is no result with this fingerprint."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("schema") != SCHEMA or document.pop("fingerprint") != fingerprint:
            return None
        result = from_json(TaskResult, document)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # invalid: score the task again
    is_whole = all(len(scores) == result.num_items for scores in result.item_scores.values())
    return result if is_whole else None


def mean_of(values: list[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Mean of independent estimates (value, standard error), with its own standard error."""
    mean = math.fsum(value for value, _ in values) / len(values)
    errors = [error for _, error in values]
    if any(error is None for error in errors):
        return mean, None
    return mean, math.sqrt(math.fsum((error or 0.0) ** 2 for error in errors)) / len(errors)
