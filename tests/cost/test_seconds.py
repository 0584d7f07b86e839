"""Seconds of a step: sums on a CPU, the longest of what goes on at once on an accelerator, near what was measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from steplm.config import changed, load_config
from steplm.cost.devices import DEVICES, published_flops
from steplm.cost.seconds import Speeds, StepSeconds, published_speeds, step_seconds, total_seconds
from steplm.cost.work import KINDS, Work
from steplm.planner.plan import plan

ROOT = Path(__file__).parents[2]
TIMED = [
    (Work("layers forward", "bf16 products", 0), 2.0),
    (Work("layers forward", "launches", 0), 3.0),
    (Work("frozen from host", "bus", 0), 2.5),
    (Work("activations to host", "bus", 0), 0.5),
    (Work("update", "update", 0), 1.0),
    (Work("update", "launches", 0), 0.25),
]


def test_a_cpu_does_one_thing_after_the_other() -> None:
    assert total_seconds(TIMED, asynchronous=False) == 9.25


def test_an_accelerator_waits_for_the_longest_of_computing_launches_and_copies() -> None:
    assert total_seconds(TIMED, asynchronous=True) == 3.0 + 1.0  # launches in the passes, computing in the update
    assert total_seconds(TIMED[2:], asynchronous=True) == 2.5 + 1.0


def sum_of(step: StepSeconds, kind: str) -> float:
    return sum(seconds for work, seconds in zip(step.work, step.seconds, strict=True) if work.kind == kind)


def test_the_share_of_updates_in_host_memory_falls_with_the_number_of_micro_batches() -> None:
    step = StepSeconds((), (), total=12.0, host_update=2.0)
    assert step.micro_batches_until_host_update_is(0.1, micro_batches=10) == 18  # 2 s of 2 + 18
    assert StepSeconds((), (), 12.0, 0.0).micro_batches_until_host_update_is(0.1, 10) == 0


@pytest.mark.parametrize("micro_batches", [1, 64])
def test_updates_in_host_memory_hide_behind_the_last_backward_pass_if_they_are_made_during_it(
    micro_batches: int,
) -> None:
    options = ("method=vanilla", "plan.num_stages=1", "train.device=cuda", "memory.offload_optimizer=true")
    seconds = {}
    for fused in ("false", "true"):
        accumulated = f"train.gradient_accumulation_steps={micro_batches}"
        config = load_config("llama_368m", [*options, accumulated, f"memory.fused_backward={fused}"])
        made = plan(config)
        step = step_seconds(config, made.shape, made.schedule.phases[0], published_speeds("h200"))
        assert step is not None
        seconds[fused] = step.total
        assert step.host_update == pytest.approx(step.total - seconds["false"] + sum_of(step, "host update"))
        timed = list(zip(step.work, step.seconds, strict=True))
    update = sum_of(step, "host update")
    backward = sum(part for work, part in timed if work.part == "layers backward") / micro_batches
    assert seconds["false"] - seconds["true"] == pytest.approx(min(update, backward))
    assert 0 < backward < update


def test_a_delayed_update_takes_only_the_time_by_which_it_outlasts_the_passes() -> None:
    options = ("method=vanilla", "plan.num_stages=1", "train.device=cuda", "memory.offload_optimizer=true")
    for micro_batches, is_hidden in ((1, False), (64, True)):
        config = load_config("llama_368m", [*options, f"train.gradient_accumulation_steps={micro_batches}"])
        made = plan(config)
        phase, speeds = made.schedule.phases[0], published_speeds("h200")
        plain = step_seconds(config, made.shape, phase, speeds)
        delayed = step_seconds(changed(config, {"memory.delay_update": True}), made.shape, phase, speeds)
        assert plain is not None
        assert delayed is not None
        assert (delayed.host_update == 0) == is_hidden
        assert plain.total - delayed.total == pytest.approx(plain.host_update - delayed.host_update)
        assert delayed.total == pytest.approx(max(plain.total - plain.host_update, plain.host_update), rel=0.2)


def test_every_device_has_a_speed_for_every_kind_of_work_and_a_source() -> None:
    for name, device in DEVICES.items():
        assert set(published_speeds(name).per_second) == set(KINDS)
        assert device.source
        assert device.fp32_flops < device.bf16_flops


@pytest.mark.parametrize("run", ["llama_368m", "corpus_60m"])
def test_planned_seconds_are_near_those_measured_on_an_h200(run: str) -> None:
    """The kept measurements, to which the shares of the published figures were fitted."""
    ratios = []
    chunk = ["train.loss_chunk_size=4096"] if run == "corpus_60m" else []
    for measured in json.loads((ROOT / f"results/gpu_step/{run}.json").read_text())["stages"]:
        stages = ["plan.num_stages=1"] if measured["method"] == "vanilla" else []
        compiled = f"train.compile={str(measured['compiled']).lower()}"
        config = load_config(run, ["train.gradient_accumulation_steps=1", compiled, *stages, *chunk])
        made = plan(config)
        phase = made.stages[measured["stage"] - 1].highest_phase
        step = step_seconds(config, made.shape, phase, published_speeds("h200"))
        assert step is not None
        ratios.append(step.total / statistics.median(measured["step_seconds"]))
    assert statistics.median(abs(ratio - 1) for ratio in ratios) < 0.1
    assert all(0.75 < ratio < 1.25 for ratio in ratios)


def test_a_device_of_twice_the_speed_takes_half_the_time() -> None:
    config = load_config("llama_368m")
    made = plan(config)
    speeds = published_speeds("a100-80gb")
    twice = Speeds("twice", {kind: 2 * rate for kind, rate in speeds.per_second.items()}, True, "")
    for stage in made.stages:
        once, quicker = (step_seconds(config, made.shape, stage.phases[0], each) for each in (speeds, twice))
        assert once is not None
        assert quicker is not None
        assert quicker.total == pytest.approx(once.total / 2)


def test_a_tiny_model_waits_for_its_launches_and_a_large_one_does_not() -> None:
    tiny = ["model.hidden_size=64", "model.intermediate_size=160", "pet.rank=8", "train.per_device_train_batch_size=1"]
    for overrides, waits in ((tiny, True), ([], False)):
        config = load_config("llama_368m", overrides)
        made = plan(config)
        step = step_seconds(config, made.shape, made.schedule.phases[-1], published_speeds("h200"))
        assert step is not None
        assert step.waits_for_launches is waits


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-PCIE-40GB", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_the_name_that_pytorch_gives_it(name: str, device: str | None) -> None:
    assert published_flops(name, "bf16") == (None if device is None else DEVICES[device].bf16_flops)
    assert published_flops(name, "fp32") == (None if device is None else DEVICES[device].fp32_flops)
