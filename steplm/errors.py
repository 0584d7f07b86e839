"""Every error that steplm raises on purpose.

    SteplmError
    ├── ConfigError              what the user wrote cannot be run          (exit code 2)
    ├── PlanError                no plan, or a plan that cannot be obeyed
    │   └── PlanInfeasible       the numbers do not allow it
    ├── DataError                text, tokens, tokenizers, manifests
    │   └── HubUnavailable       a hub was needed and cannot be reached
    ├── GrowthError              a growth that makes no model
    ├── CheckpointError          a checkpoint that cannot be used
    │   └── CheckpointMismatch   a checkpoint of another plan or trainable set
    ├── WriteError               the file system refuses to write
    ├── RankLost                 another process of this run is gone
    ├── JudgeError               the judge of an evaluation cannot be asked
    ├── MemoryMismatch           measured bytes differ from the planned bytes
    └── TrainingDiverged         the loss is NaN or infinite

A message gives the fact, the numbers and the way out. Numbers are attributes as well, so that a
program need not parse the sentence.
"""

from __future__ import annotations

from typing import Any


class SteplmError(Exception):
    """Base of all errors of this package; ``details`` holds the numbers of the message."""

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
    """A plan cannot be made or obeyed."""


class PlanInfeasible(PlanError):
    """No plan satisfies the constraints."""


class DataError(SteplmError):
    """Text, tokens, a tokenizer or a manifest is unusable."""


class HubUnavailable(DataError):
    """The Hugging Face hub is needed for this input and cannot be reached."""


class GrowthError(SteplmError):
    """The requested growth does not make a model."""


class CheckpointError(SteplmError):
    """A checkpoint is missing, incomplete, damaged, or cannot be written."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint belongs to another plan, or trains other parameters than the plan says."""


class WriteError(SteplmError):
    """The file system refuses to write: it is full or read-only, a file is too large, a quota is spent."""


class RankLost(SteplmError):
    """Another process of this run has failed or was killed: what this one does together with it cannot go on."""


class JudgeError(SteplmError):
    """The judge of an evaluation refuses the key, knows no such model, or is not there."""


class MemoryMismatch(SteplmError):
    """The measured model-state bytes differ from the planned bytes."""


class TrainingDiverged(SteplmError):
    """The loss became NaN or infinite."""
