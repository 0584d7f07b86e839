"""``steplm prepare``."""

from __future__ import annotations

from steplm.cli.plan import counted_shape
from steplm.config import RunConfig
from steplm.data.mixture import epochs, repetition_warnings, told_epochs
from steplm.data.prepare import prepare, with_prepared_dir
from steplm.data.statistics import described, document_statistics
from steplm.data.tokens import Manifest, TokenDataset, verify
from steplm.errors import ConfigError, PlanInfeasible
from steplm.planner.auto import load_config
from steplm.planner.plan import plan
from steplm.training.display import make_display
from steplm.units import format_bytes, format_count


def run_prepare(run: str, overrides: list[str], *, verify_hashes: bool = False) -> None:
    config = with_prepared_dir(load_config(run, overrides))
    display = make_display(config.log.progress)
    manifest = prepare(config, display.prepare)
    for name, split in manifest.splits.items():
        display.console.print(
            f"{name}: {split.num_documents:,} document{'s' * (split.num_documents != 1)}, "
            f"{format_count(split.num_tokens)} tokens"
            + (f", {format_bytes(split.num_text_bytes)} of text" if split.num_text_bytes else "")
        )
        if name.startswith("train"):
            dataset = TokenDataset(config.prepared_dir, name)
            for line in described(document_statistics(dataset, config.train.sequence_length)):
                display.console.print(line)
    for line in _repetitions(config, manifest):
        display.console.print(line)
    display.console.print(f"shards in {config.prepared_dir}")
    if verify_hashes:
        verify(config.prepared_dir)
        display.console.print("verified: every shard and the tokenizer match their hashes")


def _repetitions(config: RunConfig, manifest: Manifest) -> list[str]:
    """How many epochs the planned run trains over its data; empty if there is no plan."""
    try:
        total_tokens = plan(config, counted_shape(config)).total_tokens
    except (ConfigError, PlanInfeasible):  # training will report it
        return []
    of_sources = epochs(manifest, config.data.weights, total_tokens)
    told = f"the planned {format_count(total_tokens)} tokens are {told_epochs(of_sources)}"
    return [told.replace(" are epochs:", " in epochs:"), *repetition_warnings(of_sources)]
