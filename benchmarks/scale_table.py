"""Plan LLaMA 7B, 13B and 70B on 8 to 1,024 GPUs: memory per rank by term, FLOPs, traffic, time per step.

    python benchmarks/scale_table.py    # takes a minute, without PyTorch or a GPU

Writes results/scale_table/table.json, and the tables between the markers in results/scale_table/README.md and, a few of
the rows and columns, in docs/scale.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import steplm
from steplm.config import RunConfig, load_config
from steplm.cost.devices import DEVICES
from steplm.cost.sharded import COMMUNICATION, GATHERED
from steplm.cost.traffic import LINK_SHARE, PER_NODE, UTILIZATION, estimate_step
from steplm.planner.plan import plan
from steplm.types import MemoryEstimate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results/scale_table"
TABLE, PAGE, FULL = RESULTS / "table.json", ROOT / "docs/scale.md", RESULTS / "README.md"

# As published: hidden size, feed-forward size, layers, heads, key-value heads.
MODELS = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}
WORLD_SIZES = (8, 64, 256, 1024)
SHARD_SIZES = (8, 64, 1024)  # on 1,024 devices
WAYS = {"vanilla": {"num_stages": 1}, "STEP, K=3": {"num_stages": 3}}
DEVICE = "h100"
HEAD = "| --- | ---: | --- |"  # alignment of the columns of `_head`
SUMMARY = [(model, world_size) for model in ("7B", "70B") for world_size in (8, 256)]


def configure(model: str, way: str, world_size: int, shard_size: int | None = None) -> RunConfig:
    hidden, feed_forward, layers, heads, key_value_heads = MODELS[model]
    return load_config(
        {
            "model": {
                "hidden_size": hidden,
                "intermediate_size": feed_forward,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": key_value_heads,
                "vocab_size": 32000,
                "max_position_embeddings": 4096,
            },
            "plan": {**WAYS[way], "tokens_per_parameter": 20, "objective": "model_state"},
            "pet": {"rank": 128},
            "train": {
                "precision": "bf16",
                "sequence_length": 4096,
                "per_device_train_batch_size": 1,
                "global_batch_size": 1024,
                "gradient_checkpointing": True,
            },
            "distributed": {"world_size": world_size, "shard_size": shard_size},
        }
    )


def terms_of(memory: MemoryEstimate) -> dict[str, int]:
    """The bytes at one moment by term; they add up to its total."""
    gathered, communication = memory.bytes_of(GATHERED), memory.bytes_of(COMMUNICATION)
    return {
        "shards": memory.bytes_of(kind="weights") - gathered + memory.bytes_of(kind="optimizer"),
        "gradients": memory.bytes_of(kind="gradients"),
        "gathered": gathered,
        "communication": communication,
        "activations": memory.bytes_of(kind="activations"),
        "workspace": memory.bytes_of(kind="workspace") - communication,
    }


def row_of(model: str, way: str, world_size: int, shard_size: int | None = None) -> dict[str, Any]:
    config = configure(model, way, world_size, shard_size)
    made = plan(config)
    steps = [estimate_step(config, made.shape, phase, DEVICES[DEVICE]) for phase in made.schedule.phases]
    highest = max(made.stages, key=lambda stage: stage.device_bytes)
    assert highest.peak is not None
    moment = highest.peak.highest
    num_steps = sum(step.num_steps for step in steps)

    def mean(values: Iterator[float]) -> float:
        return sum(step.num_steps * value for step, value in zip(steps, values, strict=True)) / num_steps

    return {
        "model": model,
        "way": way,
        "world_size": world_size,
        "num_shards": config.distributed.num_shards,
        "layers": list(made.layers),
        "model_state_bytes": made.peak_model_state_bytes,
        "peak_bytes": moment.memory.total_bytes,
        "peak_stage": highest.index,
        "peak_moment": moment.name,
        "peak_terms": terms_of(moment.memory),
        "training_flops": made.training_flops,
        "micro_batches": config.micro_batches,
        "num_steps": num_steps,
        # Means over all steps of the run.
        "sent_bytes": round(mean(step.traffic.total for step in steps)),
        "compute_seconds": mean(step.compute_seconds for step in steps),
        "communication_seconds": mean(step.communication_seconds for step in steps),
        "least_seconds": mean(step.least_seconds for step in steps),
        "most_seconds": mean(step.most_seconds for step in steps),
    }


def planned() -> dict[str, Any]:
    return {
        "version": steplm.__version__,
        "device": DEVICE,
        "utilization": UTILIZATION,
        "link_share": LINK_SHARE,
        "rows": [row_of(model, way, size) for model in MODELS for size in WORLD_SIZES for way in WAYS],
        "hybrid": [row_of(model, "STEP, K=3", 1024, size) for model in MODELS for size in SHARD_SIZES],
    }


def blocks(table: dict[str, Any]) -> dict[Path, dict[str, str]]:
    """The Markdown between each pair of markers of each page."""
    few = [row for row in table["rows"] if (row["model"], row["world_size"]) in SUMMARY]
    hybrid_few = [row for row in table["hybrid"] if row["model"] == "70B"]
    return {
        PAGE: {
            "memory": _memory_summary(few),
            "time": _time_summary(few),
            "hybrid": _hybrid(hybrid_few),
            "assumed": _assumed(table),
        },
        FULL: {
            "memory": _memory(table["rows"]),
            "time": _time(table["rows"]),
            "hybrid": _hybrid(table["hybrid"]),
        },
    }


def _memory_summary(rows: list[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any], saved: str) -> list[str]:
        unsharded = sum(row["peak_terms"][name] for name in ("gathered", "communication", "activations"))
        return [*_head(row), _gib(row["model_state_bytes"]), _gib(unsharded), f"**{_gib(row['peak_bytes'])}**", saved]

    columns = "| model | GPUs | | state | gathered layers, buffers, activations | peak | |"
    return _table(columns, HEAD, (cells(*each) for each in _with_saved(rows)))


def _time_summary(rows: list[dict[str, Any]]) -> str:
    columns = "| model | GPUs | | FLOPs | sent, GiB | a step, s | the run, days |"
    cells = ([*_head(row), _flops(row), _gib(row["sent_bytes"]), _step(row), _days(row)] for row in rows)
    return _table(columns, HEAD, cells)


def _memory(rows: list[dict[str, Any]]) -> str:
    columns = "| model | GPUs | | state | shards | gradients | gathered | buffers | activations | workspace | peak | |"

    def cells(row: dict[str, Any], saved: str) -> list[str]:
        terms = [_gib(count) for count in row["peak_terms"].values()]
        return [*_head(row), _gib(row["model_state_bytes"]), *terms, f"**{_gib(row['peak_bytes'])}**", saved]

    return _table(columns, HEAD, (cells(*each) for each in _with_saved(rows)))


def _with_saved(rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row, and by how much its peak differs from vanilla's on as many GPUs."""
    vanilla = {(row["model"], row["world_size"]): row["peak_bytes"] for row in rows if row["way"] == "vanilla"}
    for row in rows:
        saved = row["peak_bytes"] / vanilla[row["model"], row["world_size"]] - 1
        yield row, f"{saved:+.0%}".replace("-", "−") if saved else ""


def _time(rows: list[dict[str, Any]]) -> str:
    columns = (
        "| model | GPUs | | FLOPs | micro-batches | sent, GiB | compute, s | sending, s | a step, s | the run, days |"
    )

    def cells(row: dict[str, Any]) -> list[str]:
        seconds = (_three(row[name]) for name in ("compute_seconds", "communication_seconds"))
        sent = _gib(row["sent_bytes"])
        return [*_head(row), _flops(row), str(row["micro_batches"]), sent, *seconds, _step(row), _days(row)]

    return _table(columns, HEAD, map(cells, rows))


def _hybrid(rows: list[dict[str, Any]]) -> str:
    columns = "| model | devices that share a copy | state, GiB | peak, GiB | sent, GiB | sending, s | a step, s |"

    def cells(row: dict[str, Any]) -> list[str]:
        sizes = (_gib(row[name]) for name in ("model_state_bytes", "peak_bytes", "sent_bytes"))
        return [row["model"], f"{row['num_shards']:,}", *sizes, _three(row["communication_seconds"]), _step(row)]

    return _table(columns, "| --- |", map(cells, rows))


def _table(columns: str, head: str, rows: Iterable[list[str]]) -> str:
    """A Markdown table; ``head`` aligns the first columns, and the others hold numbers."""
    rule = head + " ---: |" * (columns.count("|") - head.count("|"))
    return "\n".join([columns, rule, *(f"| {' | '.join(cells)} |" for cells in rows)])


def _assumed(table: dict[str, Any]) -> str:
    device = DEVICES[table["device"]]
    return "\n".join(
        [
            f"- An H100 SXM reaches {table['utilization']:.0%} of its {device.bf16_flops / 1e12:g} TFLOP/s in bf16 "
            "while it computes, recomputation included.",
            f"- It sends {device.bandwidth_in_node / 1e9:g} GB/s to the others of its node of {PER_NODE}, and "
            f"{device.network_bandwidth / 1e9:g} GB/s to other nodes; collectives reach "
            f"{table['link_share']:.0%} of that.",
        ]
    )


def _head(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["model"], f"{row['world_size']:,}", row["way"]


def _flops(row: dict[str, Any]) -> str:
    return f"{row['training_flops']:.2e}"


def _step(row: dict[str, Any]) -> str:
    return f"{_three(row['least_seconds'])} – {_three(row['most_seconds'])}"


def _days(row: dict[str, Any]) -> str:
    least, most = (row["num_steps"] * row[name] / 86400 for name in ("least_seconds", "most_seconds"))
    return f"{_three(least)} – {_three(most)}"


def _gib(num_bytes: int) -> str:
    size = num_bytes / 2**30
    return f"{size:,.0f}" if size >= 1000 else f"{size:.1f}" if size >= 100 else f"{size:.2f}"


def _three(value: float) -> str:
    """Format with at least three digits and no exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


BLOCK = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)


def filled(page: str, texts: dict[str, str]) -> str:
    """The page with every block replaced by its text."""
    return BLOCK.sub(lambda match: f"<!-- {match[1]} -->\n{texts[match[1]]}\n<!-- /{match[1]} -->", page)


if __name__ == "__main__":
    made = planned()
    RESULTS.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for path, texts in blocks(made).items():
        path.write_text(filled(path.read_text(encoding="utf-8"), texts), encoding="utf-8")
