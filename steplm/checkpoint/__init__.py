"""Checkpoint folders: written atomically, read only when complete."""

from steplm.checkpoint.folder import (
    Checkpoint,
    CheckpointState,
    checkpoint_name,
    copy_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    mark_damaged,
    prune_checkpoints,
    save_checkpoint,
    save_shards,
    verify_checkpoint,
)

__all__ = [
    "Checkpoint",
    "CheckpointState",
    "checkpoint_name",
    "copy_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "mark_damaged",
    "prune_checkpoints",
    "save_checkpoint",
    "save_shards",
    "verify_checkpoint",
]
