"""Runs that never ran: real plans, events by formula."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from steplm.config import RunConfig, dump_config, load_config
from steplm.planner.plan import Plan
from steplm.planner.plan import plan as make_plan
from steplm.report.runs import RunRecord
from steplm.report.suite import EntryRecord, Question, RunEntry, SuiteRecord, save_suite
from steplm.types import to_json


@pytest.fixture
def make_record() -> Callable[..., RunRecord]:
    def make(
        label: str = "STEP",
        layers: Sequence[int] = (6, 4),
        tokens: Sequence[int] = (40_000_000, 60_000_000),
        until: float = 1.0,
    ) -> RunRecord:
        size = {"hidden_size": 1024, "intermediate_size": 2736, "num_attention_heads": 16}
        values = {
            "model": {**size, "num_hidden_layers": sum(layers)},
            "plan": {"num_stages": len(layers), "layers": list(layers), "tokens_per_stage": list(tokens)},
        }
        config = load_config(values)
        plan = make_plan(config)
        summary = {"validation_loss": 3.0, "validation_perplexity": 20.0, "elapsed_seconds": 200_000.0}
        events = tuple(suite_events(plan, seed=0, advantage=0.0, until=until))
        return RunRecord(label, config, plan, events, summary if until >= 1 else None)

    return make


# --- suites -----------------------------------------------------------------------------------------------

# name -> label, overrides, loss above vanilla's at the end
METHODS: dict[str, tuple[str, tuple[str, ...], float]] = {
    "vanilla": ("Vanilla", ("plan.num_stages=1",), 0.0),
    "step_2": ("STEP, 2 stages", ("plan.num_stages=2",), 0.004),
    "step_3": ("STEP, 3 stages", ("plan.num_stages=3",), 0.012),
    "no_master": ("No master weights", ("plan.num_stages=1", "memory.master_weights=false"), 0.03),
}
GRID = (0.001, 0.002, 0.004)


def suite_config(name: str, seed: int, rate: float) -> RunConfig:
    values = {
        "name": name,
        "seed": seed,
        "model": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 12, "num_attention_heads": 8},
        "plan": {"total_tokens": "20M", "objective": "model_state"},
        "pet": {"rank": 64},
        "optim": {"learning_rate": rate},
        "train": {"sequence_length": 256, "per_device_train_batch_size": 8},
    }
    return load_config(values, METHODS[name][1])


def suite_events(plan: Plan, seed: int, advantage: float, until: float = 1.0) -> list[dict[str, Any]]:
    """A plausible run: a fall, a bump at each growth, and noise that runs of one seed share."""
    shared, own = random.Random(seed), random.Random(repr((seed, advantage)))
    offset = shared.gauss(0, 0.02) + own.gauss(0, 0.004)
    total, position, events = plan.total_tokens, 0, []
    elapsed = 0.0

    def level(share: float) -> float:
        return 3.3 + advantage + offset + 4.2 * math.exp(-share * 30) + 1.6 * math.exp(-share * 4)

    for stage in plan.stages:
        start, bump = position, 0.0
        if stage.index > 1:
            bump, before = 0.25, level(position / total)
            place = {"tokens_seen": position}
            events.append(
                {"event": "merge", "stage": stage.index - 1, **place, "loss_before": before, "loss_after": before}
            )
            growth = {"loss_before": before, "loss_after": before + 0.3, "operator": "interpolation_mean"}
            events.append({"event": "growth", "stage": stage.index, **place, **growth})
        dry = stage.memory.total_bytes + 300_000_000
        events.append(
            {
                "event": "stage_start", "stage": stage.index, "num_hidden_layers": stage.num_hidden_layers,
                "planned_bytes": stage.memory.by_kind(), "measured_bytes": stage.memory.by_kind(),
                "planned_dry_run_bytes": dry, "measured_dry_run_bytes": round(1.01 * dry),
            }
        )  # fmt: skip
        speed = 9000.0 / (stage.num_hidden_layers / 12) * (1 + own.gauss(0, 0.02))
        for step in range(1, 101):
            position = start + stage.tokens * step // 100
            if position > until * total:
                return events
            elapsed += stage.tokens / 100 / speed
            loss = level(position / total) + bump * math.exp(-step / 6)
            common = {"stage": stage.index, "step": step, "tokens_seen": position}
            events.append(
                {
                    "event": "train", **common, "loss": loss + own.gauss(0, 0.03), "learning_rate": 1e-3,
                    "tokens_per_second": speed, "elapsed_seconds": elapsed, "peak_allocated_bytes": None,
                }
            )  # fmt: skip
            if step % 10 == 0:
                loss += 0.02
                events.append({"event": "eval", **common, "loss": loss, "perplexity": math.exp(loss)})
        events.append({"event": "stage_end", "stage": stage.index, "step": 100, "tokens_seen": position})
    events.append({"event": "run_end", "tokens_seen": position, "elapsed_seconds": elapsed})
    return events


def write_suite_run(folder: Path, name: str, seed: int, rate: float, until: float = 1.0) -> None:
    """A run directory with all that a report reads."""
    config = suite_config(name, seed, rate)
    plan = make_plan(config)
    penalty = METHODS[name][2] + 0.05 * math.log2(rate / 0.002) ** 2
    events = suite_events(plan, seed, penalty, until)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "plan.json").write_text(json.dumps(to_json(plan)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    versions = {"steplm": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0", "python": "3.12.3"}
    environment = {"device": "An example of a processor", "num_devices": 0, "num_threads": 8, "versions": versions}
    (folder / "environment.json").write_text(json.dumps(environment))
    if until < 1:
        return
    loss = [event for event in events if event["event"] == "eval"][-1]["loss"]
    summary = {
        "tokens_seen": plan.total_tokens,
        "elapsed_seconds": events[-1]["elapsed_seconds"],
        "validation_loss": loss,
        "validation_perplexity": math.exp(loss),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    other = loss + 0.4
    result = {"loss": other, "perplexity": math.exp(other), "bits_per_byte": other / 2.9, "num_tokens": 250_000}
    (folder / "evaluations.json").write_text(json.dumps({"wikitext2": result}))


@pytest.fixture(scope="session")
def make_suite() -> Callable[..., Path]:
    """``make_suite(folder, names, seeds, unfinished)``: a suite directory whose best rate is always 0.002.

    ``unfinished`` says (name, seed) -> status, for runs at the chosen rate.
    """

    def make(
        directory: Path,
        names: Sequence[str] = ("vanilla", "step_2"),
        seeds: Sequence[int] = (0, 1, 2),
        unfinished: Mapping[tuple[str, int], str] | None = None,
    ) -> Path:
        unfinished = unfinished or {}
        runs = []
        for name in names:
            for seed, rate in [(seeds[0], r) for r in GRID] + [(s, 0.002) for s in seeds[1:]]:
                status = unfinished.get((name, seed), "finished") if rate == 0.002 else "finished"
                folder = f"runs/{name}/lr{rate:g}-seed{seed}"
                if status != "waiting":
                    write_suite_run(directory / folder, name, seed, rate, 1.0 if status == "finished" else 0.6)
                error = "loss nan in stage 2" if status == "diverged" else None
                runs.append(RunEntry(name, seed, rate, folder, cast(Any, status), error))
        entries = [EntryRecord(n, METHODS[n][0], n, tuned=True, learning_rate=0.002) for n in names]
        question = Question(
            "STEP against ordinary pre-training",
            tuple(names),
            "vanilla",
            "Does a model that grows in stages end where an ordinary one does, in less memory?",
        )
        record = SuiteRecord(
            "example", "tokens", tuple(seeds), tuple(entries), tuple(runs), (question,), GRID, seeds[0], "vanilla"
        )
        save_suite(record, directory)
        return directory

    return make
