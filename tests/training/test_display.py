"""What a person reads: paths as they are, and how long it still takes."""

from __future__ import annotations

import io
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from steplm.config import load_config
from steplm.cost.measure import PeakMemory
from steplm.data.prepare import PrepareProgress
from steplm.planner.plan import Plan
from steplm.planner.plan import plan as make_plan
from steplm.training.display import Display, RichDisplay
from steplm.training.signals import describe_stop
from steplm.training.step import StepReport, StepResult
from steplm.types import MemoryEstimate, TrainState


@pytest.fixture
def plan() -> Plan:
    values = {"model": {"num_hidden_layers": 4}, "plan": {"num_stages": 2, "total_tokens": 2_000_000}}
    return make_plan(load_config(values))


def _console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, soft_wrap=True, width=300), text


@pytest.mark.parametrize("kind", [Display, RichDisplay])
def test_paths_with_brackets_are_printed_as_they_are(kind: type[Display]) -> None:
    console, text = _console()
    display = kind(console)
    folder = Path("runs/[/x] [bold]y")
    display.note(f"{folder} is finished already")
    display.finished(folder, folder / "export", 1.0)
    assert text.getvalue().count(str(folder)) == 2


def _show_step(display: Display, plan: Plan, seconds_left: int, speed: float) -> None:
    tokens_seen = plan.total_tokens - round(seconds_left * speed)
    progress = TrainState(1, 1, step=5, phase_step=5, tokens_seen=tokens_seen)
    result = StepResult(loss=1.0, grad_norm=1.0)
    display.step(StepReport(plan.schedule.phases[0], progress, 9, result, 1e-3, speed, PeakMemory()))


def test_data_preparation_tells_tokens_once_there_can_be_some() -> None:
    console, text = _console()
    display = Display(console)
    progress = PrepareProgress("tokenizer", "a.txt", 1, 1, 3000, 0, 0, 0, 0, 2**20, None, 1.0, 1.0)
    display.prepare(progress)
    display.prepare(replace(progress, phase="tokens", num_train_tokens=4000))
    assert text.getvalue().splitlines() == [
        "data  tokenizer  100%  3,000 documents, 1.00 MiB",
        "data  tokens  100%  3,000 documents, 4k tokens, 1.00 MiB, 4k tok/s",
    ]


def test_a_plan_is_compared_with_ordinary_pre_training_where_it_differs(plan: Plan) -> None:
    console, text = _console()
    Display(console).plan(plan)
    vanilla = load_config({"model": {"num_hidden_layers": 4}, "plan": {"num_stages": 1, "total_tokens": 2_000_000}})
    Display(console).plan(make_plan(vanilla))
    staged, ordinary = text.getvalue().splitlines()
    assert re.search(r"model state \S+ MiB \(vanilla \S+ MiB, −\d", staged)
    assert ordinary.count("(as vanilla)") == 2
    assert "%" not in ordinary


def test_a_stop_is_told_by_what_asked_for_it() -> None:
    assert describe_stop(signal.SIGINT) == "interrupted; run the same command again to resume"
    assert describe_stop(signal.SIGTERM).startswith("stopped by SIGTERM;")


def test_a_log_line_tells_the_utilization_of_a_known_gpu(plan: Plan) -> None:
    console, text = _console()
    progress, result = TrainState(1, 1, step=5, phase_step=5, tokens_seen=0), StepResult(loss=1.0, grad_norm=1.0)
    Display(console).step(StepReport(plan.schedule.phases[0], progress, 9, result, 1e-3, 10.0, PeakMemory(), mfu=0.314))
    assert "tok/s  mfu 31%" in text.getvalue()


def test_a_log_line_tells_the_time_that_is_left_of_the_whole_plan(plan: Plan) -> None:
    console, text = _console()
    display = Display(console)
    _show_step(display, plan, 720, speed=100.0)
    assert "left" not in text.getvalue(), "without a plan nobody knows"
    display.plan(plan)
    _show_step(display, plan, 720, speed=100.0)
    assert text.getvalue().rstrip().endswith("left 12m00s")
    _show_step(display, plan, 720, speed=0.0)


def test_the_bar_tells_the_same_time_from_the_first_step(plan: Plan) -> None:
    console, text = _console()
    console = Console(file=text, force_terminal=True, width=300)
    with RichDisplay(console) as display:
        display.plan(plan)
        _show_step(display, plan, 4_000, speed=100.0)
    assert "left 1h06m" in text.getvalue()


def test_the_table_of_a_stage_marks_the_rows_that_differ(plan: Plan) -> None:
    phase = plan.schedule.phases[1]
    cost = plan.cost(phase)
    first, *others = cost.memory.terms
    for measured, differing in (
        (cost.memory, 0),
        (MemoryEstimate((replace(first, num_bytes=first.num_bytes + 1), *others)), 2),
    ):
        console, text = _console()
        Display(console).phase_start(phase, cost, measured)
        lines = text.getvalue().splitlines()
        rows = {line.split()[0]: line for line in lines[2:]}
        assert list(rows) == ["weights", "gradients", "optimizer", "adapters", "total"]
        assert f"{cost.memory.total_bytes:,}" in rows["total"]
        assert sum("differs" in row for row in rows.values()) == differing


def test_a_terminal_of_80_columns_holds_step_share_time_loss_and_speed(plan: Plan) -> None:
    _, text = _console()
    with RichDisplay(Console(file=text, force_terminal=True, width=80)) as display:
        display.plan(plan)
        progress = TrainState(1, 1, step=10_500, phase_step=10_500, tokens_seen=plan.total_tokens // 2)
        result = StepResult(loss=10.375, grad_norm=1.0)
        display.step(StepReport(plan.schedule.phases[0], progress, 20_000, result, 1e-3, 123.0, PeakMemory()))
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue()).splitlines()
    line = next(line for line in lines if "step 10,500" in line)
    assert len(line) <= 80
    for part in ("stage 1/2  step 10,500/20,000", " 50%", "left 2h15m", "loss 10.375", "123 tok/s"):
        assert part in line
    assert "…" not in line
