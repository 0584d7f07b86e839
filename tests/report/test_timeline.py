"""The figure of a run's memory: its numbers are the plan's and the count's."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import memory_timeline as timeline
import pytest
from memory_timeline import RunTimeline, draw_timelines, run_timeline, timeline_figure, with_every_option

from steplm.config import RunConfig, load_config
from steplm.planner.plan import plan
from steplm.training.simulate import simulate_growth, simulate_phase
from steplm.types import HOST


def configure(*overrides: str) -> RunConfig:
    values = {
        "model": {
            "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 500, "max_position_embeddings": 512,
        },
        "plan": {"num_stages": 2, "layers": [2, 1], "total_tokens": 100_000},
        "pet": {"rank": 8},
        "train": {
            "device": "cpu", "sequence_length": 64, "per_device_train_batch_size": 2, "loss_chunk_size": 64,
            "gradient_accumulation_steps": 4,
        },
    }  # fmt: skip
    return load_config(values, overrides)


@cache
def counted(measured: bool = False) -> RunTimeline:
    return run_timeline("STEP", configure(), measured=measured)


@pytest.mark.parametrize("measured", [False, True], ids=["simulated", "measured"])
def test_the_highest_point_of_each_part_is_the_peak_that_is_counted_there(measured: bool) -> None:
    config = configure()
    for stage, drawn in zip(plan(config).stages, counted(measured).stages, strict=True):
        peaks = {
            instant.name: instant.memory.total_bytes for instant in simulate_phase(config, stage.highest_phase).instants
        }
        if stage.index > 1:
            peaks |= {i.name: i.memory.total_bytes for i in simulate_growth(config, stage.highest_phase).instants}
        names = {"growth": "growth", "forward": "forward", "backward": "backward", "update": "optimizer step"}
        shown = {part.name: part.peak_bytes for part in drawn.parts if part.name in names}
        assert shown == {drawn_name: peaks[name] for drawn_name, name in names.items() if name in peaks}
        assert drawn.peak_bytes == max(peaks.values())


def test_lines_and_circles_are_the_plans() -> None:
    for stage, drawn in zip(plan(configure()).stages, counted().stages, strict=True):
        assert drawn.planned_bytes == stage.peak.total_bytes
        planned = {instant.name: instant.memory.total_bytes for instant in stage.peak.instants}
        circles = {part.name: part.planned_bytes for part in drawn.parts}
        assert (circles["forward"], circles["update"]) == (planned["loss"], planned["optimizer step"])
        assert circles["backward"] == max(count for name, count in planned.items() if name.startswith("backward"))
        assert circles["set-up"] is None


def test_every_stage_is_there_with_its_parts() -> None:
    steps = ["set-up", "forward", "backward", "update"]
    assert [[part.name for part in stage.parts] for stage in counted().stages] == [steps, ["growth", *steps]]


def test_kinds_add_up_to_the_planned_model_state_when_states_and_gradients_are_there() -> None:
    for stage in counted().stages:
        update = next(part for part in stage.parts if part.name == "update")
        planned = stage.stage.memory.by_kind()
        at_start = update.points[0]
        assert {kind: at_start.get(kind, 0) for kind in ("weights", "gradients", "optimizer", "adapters")} == {
            kind: planned[kind] for kind in ("weights", "gradients", "optimizer", "adapters")
        }


def test_states_bear_their_name_from_their_birth_on() -> None:
    set_up = next(part for part in counted().stages[1].parts if part.name == "set-up")
    states = [point.get("optimizer", 0) for point in set_up.points]
    assert states == sorted(states)
    assert states[0] == 0 < states[len(states) * 3 // 4] < states[-1]


def test_with_every_option_weights_that_are_packed_have_never_been_on_the_device() -> None:
    config = with_every_option(configure())
    run = run_timeline("every option", config, measured=False)
    assert [part.name for part in run.stages[1].parts] == ["growth", "set-up", "forward", "backward"]
    set_up = run.stages[1].parts[1]
    assert max(point.get("weights", 0) for point in set_up.points) == set_up.points[-1]["weights"]
    plain = 2 * plan(config).shape.num_parameters()
    assert max(point.get("weights", 0) + point.get(HOST, 0) for point in set_up.points) > plain


def test_what_is_drawn_keeps_the_highest_point() -> None:
    for part in counted().stages[1].parts:
        positions, points = timeline._thinned(part, 1.0)
        assert max(map(timeline._total, points)) == part.peak_bytes
        assert positions == sorted(positions)
        assert (positions[0], positions[-1]) == (1.0, pytest.approx(1.0 + part.width))


def test_the_figure_names_stages_peaks_and_savings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = timeline_figure(configure("train.gradient_accumulation_steps=1"), tmp_path / "new/run.svg")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text())
    assert texts.count("stage 1") == texts.count("stage 2") == 2
    assert texts.count("one stage") == 1
    made = plan(configure("train.gradient_accumulation_steps=1"))
    saving = f"{100 * (1 - made.peak_bytes / made.vanilla_peak_bytes):.1f}%"
    assert any(text.startswith("peak") and text.endswith(f"−{saving}") for text in texts)
    assert "filled: simulated" in texts


def test_axes_start_at_zero_and_hold_every_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    limits = []
    set_ylim = Axes.set_ylim
    monkeypatch.setattr(Axes, "set_ylim", lambda self, *args, **kw: limits.append(args) or set_ylim(self, *args, **kw))
    draw_timelines([counted()], tmp_path / "run.png", measured=False)
    assert limits[0][0] == 0
    assert limits[0][1] * 2**20 > max(counted().peak_bytes, counted().planned_bytes)
