"""From what a user calls a model to what is loaded: a folder, the export of a run, or a name on the hub."""

from __future__ import annotations

import difflib
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from steplm.errors import CheckpointError
from steplm.files import is_file

HUB_SECONDS = 3.0


def find_model(name: str) -> str:
    """The folder or hub name to load.

    A run's folder stands for the ``export`` folder in it. Where the hub does not answer, only what is cached is used,
    without the minutes of retries that ``huggingface_hub`` makes.

    Raises:
        CheckpointError: a path with nothing there, or a run that has no export yet.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if is_file(path / "config.json"):
            return str(path) if name.startswith("~") else name
        if is_file(path / "export/config.json"):
            return str(path / "export")
        if (path / "checkpoints").is_dir():
            raise CheckpointError(
                f"{name} is a run that has no export yet: start its command again to finish it, or, in the midst of "
                f"pre-training, steplm export {name}.",
                path=name,
            )
        return name  # whoever loads it says what is missing
    if path.exists() or _is_path(name, path):
        raise CheckpointError(f"no folder {name}.{_nearest(path)}", path=name)
    require_hub()
    return name


def require_hub() -> None:
    """Set the offline mode of Hugging Face's libraries where the hub does not answer a first request."""
    if "HF_HUB_OFFLINE" in os.environ:
        return
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # somebody is there
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module in ("huggingface_hub.constants", "datasets.config"):  # which have read the environment before
            if module in sys.modules:
                sys.modules[module].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _is_path(name: str, path: Path) -> bool:
    """Whether it cannot be OWNER/NAME on the hub: of another depth, with a mark of a path, or in a local folder."""
    return len(path.parts) != 2 or name.startswith((".", "/", "~")) or name.endswith("/") or path.parent.is_dir()


def _nearest(path: Path) -> str:
    """A suggestion for the message: the folder with the most similar name, at the deepest level that exists."""
    while not path.parent.is_dir() and path.parent != path:
        path = path.parent
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""
