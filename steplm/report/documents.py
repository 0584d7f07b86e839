"""Validated documents of a run directory: every field that a report computes with is present and has the right type.

A disk error, another version or manual edits may have changed any of these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel

from steplm.config import RunConfig
from steplm.errors import SteplmError
from steplm.planner.old_plans import OLD_SCHEMA_VERSION, plan_of_old_run
from steplm.planner.plan import Plan
from steplm.types import from_json
from steplm.units import reason

MOST = 1e18  # largest number in a document, so that a plan's sums and products stay far below the float limit
Amount = Annotated[float, Field(ge=0, le=MOST)]
Loss = Annotated[float, Field(ge=-MOST, le=MOST)]
Perplexity = Annotated[float, Field(ge=0)]
Size = Annotated[int, Field(ge=0, le=int(MOST))]


class _Document(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class MeasuredBytes(_Document):
    """Bytes by kind, as in ``MemoryEstimate.by_kind``."""

    model_config = ConfigDict(extra="forbid")

    weights: Size
    gradients: Size
    optimizer: Size
    adapters: Size
    total: Size
    host: Size = 0


class Event(_Document):
    """A line of ``metrics.jsonl``: see ``steplm.training.metrics``."""

    event: str
    stage: Annotated[int, Field(ge=1)] | None = None
    tokens_seen: Size | None = None
    elapsed_seconds: Amount | None = None
    tokens_per_second: Amount | None = None
    loss: Loss | None = None
    loss_before: Loss | None = None
    loss_after: Loss | None = None
    perplexity: Perplexity | None = None
    measured_bytes: MeasuredBytes | None = None
    planned_dry_run_bytes: Size | None = None
    measured_dry_run_bytes: Size | None = None
    peak_allocated_bytes: Size | None = None
    documents_by_length: Annotated[list[Size], Field(min_length=1, max_length=64)] | None = None


NEEDED = {
    "data": ("documents_by_length",),
    "train": ("stage", "tokens_seen", "elapsed_seconds", "tokens_per_second", "loss"),
    "eval": ("stage", "tokens_seen", "loss", "perplexity"),
    "growth": ("stage", "tokens_seen"),
    "stage_start": ("stage", "measured_bytes"),
    "stage_end": ("stage", "tokens_seen"),
}


class Summary(_Document):
    """``summary.json``."""

    validation_loss: Loss
    validation_perplexity: Perplexity
    elapsed_seconds: Amount


class Scores(_Document):
    """Scores on one text in ``evaluations.json``."""

    loss: Loss
    bits_per_byte: Loss | None = None
    perplexity: Perplexity | None = None
    num_tokens: Size | None = None


class Evaluations(RootModel[dict[str, Scores]]):
    """``evaluations.json``."""


class Environment(_Document):
    """``environment.json``."""

    device: str | None = None
    num_devices: Size | None = None
    versions: dict[str, str] = {}


D = TypeVar("D", bound=BaseModel)


def read_document(kind: type[D], path: Path) -> dict[str, Any] | None:
    """Read a JSON object, validate it as ``kind`` and return it unchanged; ``None`` if the file does not exist.

    Raises:
        SteplmError: the file is unreadable or invalid.
    """
    if not path.is_file():
        return None
    try:
        values = parse_json(path.read_bytes())
        kind.model_validate(values)
    except (OSError, ValueError) as error:
        raise unusable(path, error) from None
    return values


def read_plan(path: Path, config: RunConfig) -> tuple[Plan, tuple[int, ...]]:
    """Read ``plan.json``; return the plan, and its stage for every stage number in ``metrics.jsonl``.

    Args:
        config: the run's ``config.yaml``, from which a plan by steplm 0.1 is rebuilt.

    Raises:
        SteplmError: the file is not a plan, or is from another version.
    """
    try:
        values = parse_json(path.read_bytes())
        if any(not 0 <= number <= MOST for number in _numbers(values)):
            raise ValueError("a number below 0 or beyond measure")
        if isinstance(values, dict) and values.get("schema_version") == OLD_SCHEMA_VERSION:
            plan, stages = plan_of_old_run(config, values)
        else:
            plan = from_json(Plan, values)
            stages = tuple(stage.index for stage in plan.stages)
        if [*dict.fromkeys(stages)] != [*range(1, plan.num_stages + 1)] or not stages:
            raise ValueError("its stages are not numbered from 1")
        if not plan.layers or 0 in (plan.vanilla_model_state_bytes, plan.peak_model_state_bytes, plan.total_tokens):
            raise ValueError("a plan without layers, bytes or tokens")
    except (OSError, ValueError, TypeError, LookupError, SteplmError) as error:
        raise unusable(path, error) from None
    return plan, stages


def read_events(path: Path, stages: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the events of a ``metrics.jsonl``; none if the file does not exist.

    Args:
        stages: the plan's stage for every stage number, from ``read_plan``.

    Raises:
        SteplmError: a line is not a valid event; names the first such line.
    """
    if not path.is_file():
        return
    # A process killed while writing may leave half a line at the end.
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            values = parse_json(line)
            event = Event.model_validate(values)
            if event.stage is not None and event.stage > len(stages):
                raise ValueError(f"stage {event.stage} of {len(stages)}")
            if missing := [key for key in NEEDED.get(event.event, ()) if getattr(event, key) is None]:
                raise ValueError(f"a {event.event!r} event without {', '.join(missing)}")
        except ValueError as error:
            raise unusable(path, error, line=number) from None
        yield values if event.stage is None else values | {"stage": stages[event.stage - 1]}


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON whose strings can all be encoded again.

    Raises:
        ValueError: the data is not such JSON.
    """
    try:
        values = json.loads(data.decode())
        if b"\\u" in data:  # an escaped lone surrogate parses, but cannot be encoded
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return values


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _numbers(child)
    elif isinstance(value, int | float):
        yield value


def unusable(path: Path, error: Exception, *, line: int | None = None) -> SteplmError:
    """Make the error for a file that cannot be parsed."""
    where = str(path) if line is None else f"line {line} of {path}"
    return SteplmError(
        f"{where} cannot be read: {reason(error)}. It is damaged, or another version of steplm wrote it.",
        path=str(path),
        line=line,
    )
