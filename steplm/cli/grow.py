"""``steplm grow``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from steplm.cli.model_paths import find_model
from steplm.training.grow_folder import grow


def run_grow(model: str, *, to: int, output: Path, operator: str, position: str | None, seed: int) -> None:
    folder = find_model(model) if Path(model).is_dir() else model
    layer_map = grow(folder, to=to, output_dir=output, operator=operator, position=position, seed=seed)
    table = Table("layer", "made of", box=None, title=f"{output}: {layer_map.num_layers} layers", title_justify="left")
    for index, origin in enumerate(layer_map.origins):
        parents = ", ".join(f"layer {parent}" for parent in origin.parents)
        table.add_row(str(index), f"[green]new[/]  {operator} of {parents}" if origin.is_new else parents)
    Console().print(table)
