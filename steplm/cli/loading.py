"""Say on a terminal that PyTorch is loading, which takes seconds."""

from __future__ import annotations

import importlib

from steplm.launch import launched_rank


def load_torch() -> None:
    """Import PyTorch and Transformers; later imports of them take no time."""
    from rich.console import Console

    console = Console(stderr=True, quiet=launched_rank() not in (None, 0))
    with console.status("loading PyTorch"):  # shown on a terminal only
        importlib.import_module("transformers.modeling_utils")
