"""Runs that never ran: plans by hand, events by formula."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from steplm.config import RunConfig
from steplm.report.runs import RunRecord
from steplm.types import LinearShape, MemoryEstimate, MemoryTerm, ModelShape, Plan, Stage

P_LAYER, P_ADAPTER, P_EMBEDDING = 12_600_000, 2_700_000, 65_500_000
BYTES = {"weights": 2, "gradients": 2, "optimizer": 12}


def estimate(num_new: int, num_old: int) -> MemoryEstimate:
    trained = {"new_layers": num_new * P_LAYER, "adapters": num_old * P_ADAPTER, "embeddings": P_EMBEDDING}
    terms = [MemoryTerm(c, kind, n * b, "", n) for c, n in trained.items() if n for kind, b in BYTES.items()]
    if num_old:
        terms.append(MemoryTerm("frozen_layers", "weights", 2 * num_old * P_LAYER, "", num_old * P_LAYER))
    return MemoryEstimate(tuple(terms))


def make_plan(layers: Sequence[int], tokens: Sequence[int]) -> Plan:
    shape = ModelShape(
        "llama",
        32000,
        1024,
        sum(layers),
        16,
        False,
        (LinearShape("mlp.up_proj", 3000, 4200),),
        0,
        P_EMBEDDING,
        0,
        0,
    )
    depths = [sum(layers[: i + 1]) for i in range(len(layers))]
    stages = tuple(
        Stage(i + 1, n, depth, None, ("*",), None, round(t / 0.75), t, estimate(n, depth - n))
        for i, (n, depth, t) in enumerate(zip(layers, depths, tokens, strict=True))
    )
    return Plan(shape, "bf16", stages, True, estimate(sum(layers), 0).total_bytes)


def by_kind(memory: MemoryEstimate) -> dict[str, int]:
    adapters = memory.bytes_of("adapters")
    kinds = {kind: memory.bytes_of(kind=kind) - memory.bytes_of("adapters", kind) for kind in BYTES}
    return {**kinds, "adapters": adapters, "total": memory.total_bytes}


def make_events(plan: Plan, until: float, advantage: float) -> list[dict[str, Any]]:
    noise = random.Random(0)
    total, step = plan.total_tokens, plan.total_tokens // 400
    events: list[dict[str, Any]] = []
    position = 0
    for stage in plan.stages:
        if stage.index > 1:
            events.append({"event": "growth", "stage": stage.index, "tokens_seen": position})
        measured = by_kind(stage.memory)
        events.append({"event": "stage_start", "stage": stage.index, "measured_bytes": measured})
        end = position + stage.tokens
        bump = 0.35 if stage.index > 1 else 0.0
        start = position
        while position < end:
            position = min(position + step, end)
            if position > until * total:
                return events
            share = position / total
            loss = 2.9 - advantage + 7.5 * math.exp(-share * 60) + 1.4 * math.exp(-share * 5)
            loss += bump * math.exp(-(position - start) / total * 60)
            common = {"stage": stage.index, "tokens_seen": position}
            events.append(
                {
                    "event": "train", **common, "loss": loss + noise.gauss(0, 0.06),
                    "tokens_per_second": 1000.0 + 100 * stage.index, "elapsed_seconds": position / 1000,
                }
            )  # fmt: skip
            if (position // step) % 40 == 0:
                events.append({"event": "eval", **common, "loss": loss + 0.03, "perplexity": math.exp(loss + 0.03)})
        events.append({"event": "stage_end", "stage": stage.index, "tokens_seen": position})
    return events


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    def make(
        label: str = "STEP",
        layers: Sequence[int] = (6, 4),
        tokens: Sequence[int] = (40_000_000, 60_000_000),
        until: float = 1.0,
        advantage: float = 0.0,
    ) -> RunRecord:
        plan = make_plan(layers, tokens)
        summary = {"validation_perplexity": 20.0, "elapsed_seconds": 200_000.0} if until >= 1 else None
        return RunRecord(label, RunConfig(), plan, tuple(make_events(plan, until, advantage)), summary)

    return make
