"""The ``steplm`` command."""

from steplm.cli.app import main

__all__ = ["main"]
