"""``steplm prepare``."""

from __future__ import annotations

from steplm.config import load_config
from steplm.data.prepare import prepare, with_prepared_dir
from steplm.data.tokens import verify
from steplm.training.display import make_display
from steplm.units import format_bytes, format_count


def run_prepare(run: str, overrides: list[str], *, verify_hashes: bool = False) -> None:
    config = with_prepared_dir(load_config(run, overrides))
    display = make_display(config.log.progress)
    manifest = prepare(config, display.prepare)
    for name, split in manifest.splits.items():
        display.console.print(
            f"{name}: {split.num_documents:,} documents, {format_count(split.num_tokens)} tokens"
            + (f", {format_bytes(split.num_text_bytes)} of text" if split.num_text_bytes else "")
        )
    display.console.print(f"shards in {config.prepared_dir}", highlight=False)
    if verify_hashes:
        verify(config.prepared_dir)
        display.console.print("every shard and the tokenizer have the hashes they were written with")
