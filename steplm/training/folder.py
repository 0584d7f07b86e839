"""A run directory: its files, and how far the run got."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from steplm.checkpoint import mark_damaged, verify_checkpoint
from steplm.checkpoint.folder import complete_checkpoints
from steplm.config import RunConfig, load_written_config
from steplm.errors import CheckpointError, ConfigError, PlanInfeasible
from steplm.planner.old_plans import OLD_SCHEMA_VERSION, plan_of_old_run
from steplm.planner.plan import SCHEMA_VERSION, Plan
from steplm.types import from_json
from steplm.units import reason


@dataclass(frozen=True)
class RunFolder:
    """A snapshot of a run directory."""

    path: Path
    checkpoints: tuple[Path, ...]  # complete ones, earliest progress first
    damaged: tuple[Path, ...]
    finished: bool  # summary.json exists

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """List the directory; a missing one counts as empty."""
        checkpoints = path / "checkpoints"
        return cls(
            path=path,
            checkpoints=tuple(complete_checkpoints(checkpoints)),
            damaged=tuple(sorted(checkpoints.glob("*.damaged"))),
            finished=(path / "summary.json").is_file(),
        )

    @property
    def last_checkpoint(self) -> Path | None:
        return self.checkpoints[-1] if self.checkpoints else None

    @cached_property
    def written(self) -> RunConfig | None:
        """The configuration in ``config.yaml``, if there is one.

        Raises:
            ConfigError: the file cannot be used.
        """
        return load_written_config(self.path / "config.yaml") if (self.path / "config.yaml").is_file() else None

    @property
    def begun_with(self) -> RunConfig | None:
        """The written configuration if the run has been trained, at least in part; else None."""
        return self.written if self.checkpoints or self.finished else None

    @cached_property
    def plan(self) -> Plan:
        """The plan in ``plan.json``; that of an old finished run is rebuilt from its configuration.

        Raises:
            CheckpointError: the file is missing or cannot be used.
        """
        path = self.path / "plan.json"
        try:
            values = json.loads(path.read_text())
            if isinstance(values, dict) and values.get("schema_version") == OLD_SCHEMA_VERSION:
                plan, _ = plan_of_old_run(load_written_config(self.path / "config.yaml"), values)
            else:
                plan = from_json(Plan, values)
            if not plan.layers:
                raise ValueError("a plan without layers")
        except (OSError, ValueError, TypeError, LookupError, RecursionError, ConfigError, PlanInfeasible) as error:
            raise CheckpointError(
                f"{path} cannot be used: {reason(error)}. It is damaged, or another version of steplm wrote it.",
                path=str(path),
            ) from None
        return plan

    @property
    def has_plan(self) -> bool:
        return (self.path / "plan.json").is_file()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The contents of ``summary.json``; empty if it is missing or damaged."""
        try:
            values = json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    @property
    def data_fingerprint(self) -> str | None:
        """Fingerprint of a finished run's data; None if the run is not finished or an old version finished it."""
        return self.summary.get("data_fingerprint")

    def without_damage(self, note: Any) -> RunFolder:
        """Verify the newest checkpoint; rename damaged ones, report them through ``note``, and try the one before.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        checkpoints, damaged = list(self.checkpoints), list(self.damaged)
        while checkpoints:
            try:
                verify_checkpoint(checkpoints[-1])
                break
            except CheckpointError as error:
                path = checkpoints.pop()
                note(f"passing over {path.name}: {error}")
                damaged.append(mark_damaged(path))
        if damaged and not checkpoints:
            raise CheckpointError(
                f"no checkpoint in {self.path / 'checkpoints'} is usable: {len(damaged)} are damaged, "
                f"{sorted(damaged)[-1].name} the last. Remove {self.path / 'checkpoints'} to start the run again.",
                path=str(self.path),
            )
        return replace(self, checkpoints=tuple(checkpoints), damaged=tuple(damaged))


def require_this_version(folder: RunFolder) -> None:
    """Refuse to resume a run that another version of steplm started.

    Raises:
        CheckpointError: the schema versions of the plan differ; the message states both.
    """
    if folder.finished or not folder.checkpoints or not folder.has_plan:
        return
    try:
        version = json.loads((folder.path / "plan.json").read_text()).get("schema_version")
    except (OSError, ValueError, AttributeError):
        return  # reading the plan will report what is wrong
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder.path} was begun by another version of steplm (plan schema {version}; this version has "
            f"{SCHEMA_VERSION}). Finish it with the version that began it, or start in another output_dir.",
            path=str(folder.path),
            schema_version=version,
        )
