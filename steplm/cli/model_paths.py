"""Find the model that a user names: a folder, the export of a run, or a model on the hub."""

from __future__ import annotations

import difflib
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from steplm.errors import CheckpointError

HUB_SECONDS = 3.0


def find_model(name: str) -> str:
    """Return the folder or hub name to load.

    A run folder stands for the ``export`` folder inside it. If the hub does not answer, only cached models are used, to
    avoid minutes of retries in ``huggingface_hub``.

    Raises:
        CheckpointError: the path does not exist, or the run has no export yet.
    """
    path = Path(name).expanduser()
    if os.path.isdir(path):
        if os.path.isfile(path / "config.json"):
            return str(path) if name.startswith("~") else name
        if os.path.isfile(path / "export/config.json"):
            return str(path / "export")
        if (path / "checkpoints").is_dir():
            raise CheckpointError(
                f"{name} is a run that has no export yet: start its command again to finish it, or, in the midst of "
                f"pre-training, steplm export {name}.",
                path=name,
            )
        return name  # loading it will report what is missing
    if os.path.exists(path) or _is_path(name, path):
        raise CheckpointError(f"no folder {name}.{_nearest(path)}", path=name)
    require_hub()
    return name


def require_hub() -> None:
    """Switch the Hugging Face libraries to offline mode if the hub does not answer a first request."""
    if "HF_HUB_OFFLINE" in os.environ:
        return
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # the hub answers
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module in ("huggingface_hub.constants", "datasets.config"):  # these read the environment when imported
            if module in sys.modules:
                sys.modules[module].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _is_path(name: str, path: Path) -> bool:
    """Whether the name cannot be OWNER/NAME on the hub: wrong depth, path syntax, or an existing parent folder."""
    return len(path.parts) != 2 or name.startswith((".", "/", "~")) or name.endswith("/") or os.path.isdir(path.parent)


def _nearest(path: Path) -> str:
    """A suggestion for the error message: the folder with the most similar name, at the deepest level that exists."""
    while not os.path.isdir(path.parent) and path.parent != path:
        path = path.parent
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""
