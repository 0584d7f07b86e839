"""All errors that steplm raises on purpose.

    SteplmError
    ├── ConfigError              the configuration is invalid               (exit code 2)
    ├── PlanError                a plan cannot be made or followed
    │   └── PlanInfeasible       no plan satisfies the constraints
    │       └── OverBudget       the plan needs more memory than its budget
    ├── DataError                unusable text, tokens, tokenizer or manifest
    │   └── HubUnavailable       the hub is needed and cannot be reached
    ├── GrowthError              the growth does not give a valid model
    ├── CheckpointError          a checkpoint that cannot be used
    │   └── CheckpointMismatch   a checkpoint of another plan or trainable set
    ├── WriteError               the file system refuses to write
    ├── RankLost                 another process of this run is gone
    ├── JudgeError               the judge of an evaluation cannot be used
    ├── MemoryMismatch           measured bytes differ from the planned bytes
    └── TrainingDiverged         the loss is NaN or infinite

A message states the problem, the numbers, and what to do about it. The numbers are also attributes, so that
programs need not parse the message.
"""

from __future__ import annotations

from typing import Any


class SteplmError(Exception):
    """Base class of all errors in this package; ``details`` contains the numbers in the message."""

    exit_code = 1

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details

    def __getattr__(self, name: str) -> Any:
        details = self.__dict__.get("details", {})
        if name in details:
            return details[name]
        raise AttributeError(name)


class ConfigError(SteplmError):
    """The configuration is wrong: unknown key, bad value, or values that contradict each other."""

    exit_code = 2


class PlanError(SteplmError):
    """A plan cannot be made or followed."""


class PlanInfeasible(PlanError):
    """No plan satisfies the constraints."""


class OverBudget(PlanInfeasible):
    """The plan needs more memory than ``plan.budget``; ``details["fact"]`` is the message without its advice."""

    def __init__(self, fact: str, **details: Any) -> None:
        super().__init__(f"{fact} `steplm fit` lists what would fit.", fact=fact, **details)


class DataError(SteplmError):
    """Text, tokens, a tokenizer or a manifest is unusable."""


class HubUnavailable(DataError):
    """The Hugging Face hub is needed for this input and cannot be reached."""


class GrowthError(SteplmError):
    """The requested growth does not give a valid model."""


class CheckpointError(SteplmError):
    """A checkpoint is missing, incomplete, damaged, or cannot be written."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint belongs to another plan, or trains other parameters than the plan says."""


class WriteError(SteplmError):
    """The file system refuses to write: it is full or read-only, a file is too large, or a quota is exceeded."""


class RankLost(SteplmError):
    """Another process of this run failed or was killed, so that this one cannot continue."""


class JudgeError(SteplmError):
    """The judge of an evaluation rejects the key, does not know the model, or cannot be reached."""


class MemoryMismatch(SteplmError):
    """The measured model-state bytes differ from the planned bytes."""


class TrainingDiverged(SteplmError):
    """The loss became NaN or infinite."""
