"""``steplm plan`` of several devices: one table of a device, one of a step, the same numbers for programs."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from steplm.cli.plan import render_explain, render_plan, show_plan
from steplm.cli.scale import choose_device, show_scale
from steplm.config import load_config
from steplm.cost.devices import DEVICES
from steplm.cost.traffic import UTILIZATION
from steplm.errors import ConfigError
from steplm.planner.plan import plan

VALUES: dict[str, Any] = {
    "model": {"hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 24, "num_attention_heads": 16},
    "plan": {"num_stages": 3, "objective": "model_state"},
}


def text_of(*overrides: str, width: int = 80) -> str:
    stream = io.StringIO()
    config = load_config(VALUES, overrides)
    made, console = plan(config), Console(file=stream, width=width)
    render_plan(made, console, config)
    show_scale(config, made, console, "h100", DEVICES["h100"], utilization=UTILIZATION)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("world_size", "others", "words"),
    [
        (8, ["pet.rank=8"], "8 devices, all share one copy"),
        (64, ["distributed.shard_size=8", "train.gradient_accumulation_steps=8"], "64 devices, 8 share one copy"),
        (4, ["distributed.shard_size=1"], "4 devices, a whole copy on each"),
        (1024, ["model.hidden_size=8192", "model.intermediate_size=28672", "plan.num_stages=6"], "all share one copy"),
    ],
)
def test_the_tables_fit_eighty_columns_and_say_how_the_devices_hold_the_model(
    world_size: int, others: list[str], words: str
) -> None:
    text = text_of(f"distributed.world_size={world_size}", *others)
    assert f"per device: {world_size} devices, " in text
    assert words in text
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "per device" not in text_of().split("a step of each device")[0]


def test_explain_shows_what_is_gathered_and_sent_with_their_formulas() -> None:
    stream = io.StringIO()
    config = load_config(VALUES, ["distributed.world_size=8"])
    made = plan(config)
    render_explain(made, Console(file=stream, width=120), config)
    text = stream.getvalue()
    for words in ("÷ 8, rows rounded up", "gathered weights", "all-gathered: w P_outer", "all-gather: w P_layer"):
        assert words in text
    for stage in made.stages:
        for term in stage.peak.highest.memory.terms:
            assert f"{term.num_bytes:,}" in text


def test_world_size_on_the_command_line_is_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    def document(*overrides: str, **options: Any) -> dict[str, Any]:
        show_plan("llama_368m", overrides, as_json=True, **options)
        return json.loads(capsys.readouterr().out)

    by_option = document(world_size=16, shard_size=4)
    assert by_option == document("distributed.world_size=16", "distributed.shard_size=4")
    devices = by_option["devices"]
    assert (devices["world_size"], devices["num_shards"], devices["device"]["name"]) == (16, 4, "h100")
    for phase in devices["phases"]:
        assert phase["sent_bytes"] == sum(phase["traffic"].values())
        assert phase["least_seconds"] <= phase["most_seconds"]
    assert [phase["stage"] for phase in devices["phases"]] == [stage["index"] for stage in by_option["stages"]]
    assert "devices" not in document()


def test_a_slower_network_and_a_lower_share_take_longer(capsys: pytest.CaptureFixture[str]) -> None:
    def most_seconds(**options: Any) -> float:
        show_plan("llama_368m", ["distributed.world_size=16"], as_json=True, **options)
        return json.loads(capsys.readouterr().out)["devices"]["most_seconds"]

    assert most_seconds() < most_seconds(bandwidth="1GB") < most_seconds(bandwidth="1GB/s", utilization=0.1)
    assert most_seconds() < most_seconds(device="a100-80gb")


def test_a_bandwidth_replaces_the_devices() -> None:
    config = load_config(VALUES, ["distributed.world_size=16"])

    def chosen(name: str, bandwidth: str | None) -> float | None:
        return choose_device(config, name, UTILIZATION, bandwidth).network_bandwidth

    assert chosen("h100", "12.5GB/s") == chosen("rtx4090", "12.5GB") == 12.5e9
    assert chosen("h100", None) == DEVICES["h100"].network_bandwidth
    with pytest.raises(ConfigError, match=r"--bandwidth: cannot read 'fast'.*in bytes per second"):
        chosen("h100", "fast")


def test_a_price_is_for_the_hours_of_all_devices(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan("llama_368m", world_size=16, device="h100", price=2.0, as_json=True)
    devices = json.loads(capsys.readouterr().out)["devices"]
    assert devices["costs"] == [devices[key] / 3600 * 16 * 2.0 for key in ("least_seconds", "most_seconds")]
    show_plan("llama_368m", world_size=16, device="h100", price=2.0)
    text = capsys.readouterr().out
    assert "cost  {:,.0f} to {:,.0f}".format(*devices["costs"]) in text
    assert "with the reserve fits in its 80 GB" in text
