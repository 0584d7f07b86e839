"""``steplm eval``."""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steplm.eval.perplexity import PerplexityResult, evaluate_folder
from steplm.units import format_count, parse_count

HUB_MAX_TOKENS = 10_000_000  # a data set on the hub may have no end in sight


def run_eval(
    models: list[str],
    data: list[str],
    *,
    text_field: str = "text",
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: str | int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    json_output: bool = False,
) -> None:
    """Print perplexity and bits per byte of each model as a table, or as JSON objects in a list."""
    limit = None if max_tokens is None else _count(max_tokens)
    if limit is None and any(entry.startswith("hub://") for entry in data):
        limit = HUB_MAX_TOKENS
        print(
            f"note: of hub data {format_count(limit)} tokens at most; --max-tokens sets another limit", file=sys.stderr
        )
    results = {
        model: evaluate_folder(
            model,
            data,
            text_field=text_field,
            sequence_length=sequence_length,
            stride=stride,
            batch_size=batch_size,
            max_tokens=limit,
            device=device,
            dtype=dtype,
        )
        for model in models
    }
    if json_output:
        print(json.dumps([_as_json(model, data, result) for model, result in results.items()], indent=1))
    else:
        _print_table(results)


def _count(value: str | int) -> int:
    from steplm.errors import ConfigError

    try:
        return parse_count(value)
    except ValueError as error:
        raise ConfigError(f"max_tokens: {error}") from None


def _as_json(model: str, data: list[str], result: PerplexityResult) -> dict[str, object]:
    return {
        "model": model,
        "data": data,
        "num_tokens": result.num_tokens,
        "num_text_bytes": result.num_text_bytes,
        "num_skipped_records": result.num_skipped_records,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
    }


def _print_table(results: dict[str, PerplexityResult]) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("model", overflow="fold")
    for heading in ("tokens", "perplexity", "bits per byte"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model, result in results.items():
        bits = "–" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        table.add_row(Text(model), f"{result.num_tokens:,}", f"{result.perplexity:.3f}", bits)
    console = Console()
    console.print(table)
    skipped = max(result.num_skipped_records for result in results.values())
    if skipped:
        console.print(f"{skipped:,} empty or unusable records were left out", style="yellow", highlight=False)
