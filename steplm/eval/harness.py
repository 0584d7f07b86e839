"""Scores of one model on every item of one lm_eval task.

This is the only module that imports lm_eval at module level.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import lm_eval
import torch
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from steplm.errors import DataError, SteplmError
from steplm.eval.quiet import quiet
from steplm.eval.scores import Metric, TaskResult
from steplm.units import reason

FEWSHOT_SEED = 1234  # lm_eval's own

Advance = Callable[[int, int], None]  # requests done, total requests


class Scorer(HFLM):
    """lm_eval's wrapper of a model; counts the requests scored, and those truncated to the model's context."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
        # In bf16 the log-probabilities of two endings would often tie: near 40 nats, 8 bits give steps of 0.25.
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32", backend="causal"
        )
        self.num_truncated = 0
        self.num_done = self.num_requests = 0
        self.advance: Advance = lambda done, total: None

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        longest = self.max_length + 1
        self.num_truncated += sum(len(context) + len(target) > longest for _, context, target in requests)
        self.num_done, self.num_requests = 0, len(requests)
        self.advance(0, len(requests))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        # Requests that differ only in their last token share one row, so the count may end below the total.
        self.num_done += len(inps)
        self.advance(self.num_done, self.num_requests)
        return logits


def scorer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> Scorer:
    """Wrap a model for lm_eval."""
    with quiet():
        return Scorer(model, tokenizer, batch_size)


def task_key(task: Task, limit: int | None) -> str:
    """Hash of what determines scores on a task: its items, prompts, few-shot examples and lm_eval's version."""
    config = {name: value for name, value in task.dump_config().items() if name not in ("metadata", "dataset_kwargs")}
    digest = hashlib.sha256(_text([lm_eval.__version__, str(task.VERSION), config]).encode())
    with quiet():
        for item in islice(task.eval_docs, limit):
            digest.update(_text(item).encode())
        for example in task.fewshot_docs() or () if config.get("num_fewshot") else ():
            digest.update(_text(example).encode())
    return digest.hexdigest()


def score(lm: Scorer, name: str, task: Task, limit: int | None) -> TaskResult:
    """Score every item, or the first ``limit``.

    Raises:
        DataError: lm_eval or the model fails on an item.
    """
    lm.num_truncated = 0
    task.set_fewshot_seed(FEWSHOT_SEED)
    try:
        with quiet():
            found = evaluate(lm=lm, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    except SteplmError:
        raise
    except Exception as error:  # third-party templates, metrics and models can raise anything
        advice = " Lower the batch size." if isinstance(error, torch.OutOfMemoryError) else ""
        raise DataError(
            f"task {name!r} could not be scored: {type(error).__name__}: {reason(error)}.{advice}", task=name
        ) from None
    return _result(name, task, found, limit, lm.num_truncated)


def _result(name: str, task: Task, found: dict[str, Any], limit: int | None, num_truncated: int) -> TaskResult:
    samples = found["samples"][name]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    items = [sample for sample in samples if sample["filter"] == filters[0]]
    item_scores: dict[str, tuple[float, ...]] = {}
    metrics = {}
    for key, value in found["results"][name].items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if len(filters) == 1 else f"{metric} ({filter_name})"
        scores = [sample.get(metric) for sample in samples if sample["filter"] == filter_name]
        aggregation = getattr(task.aggregation().get(metric), "__name__", "other")
        if aggregation in ("mean", "perplexity") and all(isinstance(s, int | float) for s in scores):
            item_scores[label] = tuple(float(s) for s in scores)
        else:
            aggregation = "other"
        higher = bool(task.higher_is_better().get(metric, True))
        metrics[label] = Metric(float(value), _standard_error(aggregation, item_scores.get(label)), higher, aggregation)
    return TaskResult(
        task=name,
        version=str(task.VERSION),
        num_fewshot=int(task.get_config("num_fewshot") or 0),
        limit=limit,
        metrics=metrics,
        chance=_chance(task, items),
        num_truncated=num_truncated,
        item_ids=tuple(_item_id(item) for item in items),
        item_scores=item_scores,
        loglikelihoods=tuple(_loglikelihoods(items)),
    )


def _standard_error(aggregation: str, scores: tuple[float, ...] | None) -> float | None:
    """Standard error of a mean; for a perplexity, that of the mean log-likelihood times the perplexity."""
    if scores is None or len(scores) < 2:
        return None
    mean = math.fsum(scores) / len(scores)
    variance = math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    error = math.sqrt(variance / len(scores))
    return error * math.exp(-mean) if aggregation == "perplexity" else error


def _chance(task: Task, items: list[dict[str, Any]]) -> float | None:
    """Accuracy of random guessing; ``None`` unless the task is multiple choice."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    return math.fsum(1 / len(task.doc_to_choice(item["doc"])) for item in items) / len(items)


def _item_id(item: dict[str, Any]) -> str:
    """Hash of what the model is asked, so that every copy of a dataset has the same IDs."""
    return hashlib.sha256(_text(item["arguments"]).encode()).hexdigest()[:16]


def _loglikelihoods(items: list[dict[str, Any]]) -> Iterator[tuple[float, ...]]:
    for item in items:
        answers = [answer for answer in item["filtered_resps"] if isinstance(answer, list | tuple)]
        yield tuple(float(answer[0]) for answer in answers if isinstance(answer[0], int | float))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
