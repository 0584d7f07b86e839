"""A run directory, opened once: what was written into it, and how far it got."""

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
    """A run directory as it was found."""

    path: Path
    checkpoints: tuple[Path, ...]  # complete ones, oldest progress first
    damaged: tuple[Path, ...]
    finished: bool  # its summary is written

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """List it; an absent folder is an empty one."""
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
        """``config.yaml``, where there is one.

        Raises:
            ConfigError: it cannot be used.
        """
        return load_written_config(self.path / "config.yaml") if (self.path / "config.yaml").is_file() else None

    @property
    def begun_with(self) -> RunConfig | None:
        """The configuration of a run that has been trained, at least in part."""
        return self.written if self.checkpoints or self.finished else None

    @cached_property
    def plan(self) -> Plan:
        """``plan.json``.

        Raises:
            CheckpointError: there is none that can be used.
        """
        return read_plan(self.path)

    @property
    def has_plan(self) -> bool:
        return (self.path / "plan.json").is_file()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``, or nothing where it is absent or damaged."""
        try:
            values = json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    @property
    def data_fingerprint(self) -> str | None:
        """Of the data that a finished run was trained on; None of one that is not, or that an old version finished."""
        return self.summary.get("data_fingerprint")

    def without_damage(self, note: Any) -> RunFolder:
        """The same with its newest checkpoint verified; damaged ones are renamed, and named by ``note``.

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


def read_plan(run_dir: Path) -> Plan:
    """``plan.json`` of a run directory. That of an old finished run is made again from its configuration.

    Raises:
        CheckpointError: there is none that can be used.
    """
    path = run_dir / "plan.json"
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict) and values.get("schema_version") == OLD_SCHEMA_VERSION:
            plan, _ = plan_of_old_run(load_written_config(run_dir / "config.yaml"), values)
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


def require_this_version(folder: RunFolder) -> None:
    """Refuse to resume what an earlier version began.

    Raises:
        CheckpointError: with the versions of its plan.
    """
    if folder.finished or not folder.checkpoints or not folder.has_plan:
        return
    try:
        version = json.loads((folder.path / "plan.json").read_text()).get("schema_version")
    except (OSError, ValueError, AttributeError):
        return  # reading the plan tells what is wrong
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder.path} was begun by another version of steplm (plan schema {version}; this version has "
            f"{SCHEMA_VERSION}). Finish it with the version that began it, or start in another output_dir.",
            path=str(folder.path),
            schema_version=version,
        )
