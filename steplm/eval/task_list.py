"""Find tasks by name: in the user's folders, in local copies, or in lm_eval's own list."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm.errors import ConfigError, DataError, HubUnavailable, SteplmError
from steplm.eval.local_sets import TASKS_FOLDER
from steplm.eval.quiet import quiet
from steplm.units import reason

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

# ``datasets`` builders that read local files; any other path is a dataset on the hub.
FILE_BUILDERS = ("json", "csv", "text", "parquet", "arrow", "xml", "pandas")
KNOWN_SETS = sorted(file.stem for file in TASKS_FOLDER.glob("*.yaml"))
SHOWN_NAMES = 12
_NAMES = re.compile(r"""^["']?(?:task|group)["']?[ \t]*:[ \t]*["']?([\w.-]+)""", re.MULTILINE)


@dataclass(frozen=True)
class TaskFolders:
    """Folders searched for tasks before lm_eval's own list.

    Attributes:
        paths: folders of lm_eval task files (YAML). A file may name Python functions (``!function``); those of the
            requested tasks, and only those, are run, so the files must be trusted.
        data: a folder with local copies of the datasets that ``steplm/eval/tasks`` describes.
    """

    paths: tuple[Path, ...] = ()
    data: Path | None = None


def check_names(names: Sequence[str], folders: TaskFolders) -> None:
    """Reject unknown task, group and tag names in about a second; reading lm_eval's full list takes ten.

    Raises:
        ConfigError: a folder does not exist, or a task does not (the message suggests similar names).
    """
    in_folders = {name for manager in _local_managers(folders) for name in manager.task_index}
    for name in names:
        if name not in in_folders and not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", _standard_text()):
            raise _unknown(name, sorted(in_folders), _NAMES.findall(_standard_text()), folders)


@cache
def _standard_text() -> str:
    """Concatenated text of lm_eval's own task files; a name that does not occur in it is not one of its tasks."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    files = (file for file in root.rglob("*") if file.suffix in (".yaml", "") and file.is_file())  # "": YAML includes
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def load_tasks(names: Sequence[str], folders: TaskFolders, num_fewshot: int | None = None) -> dict[str, Task]:
    """Load tasks by name, with their items; groups and tags are expanded to their tasks.

    Reading lm_eval's full list takes ten seconds or more, so it is only used for names found nowhere else.

    Raises:
        ConfigError: a folder or a task does not exist (the message suggests similar names), or a task file is invalid.
        DataError: items are missing or unusable.
        HubUnavailable: a dataset could not be fetched from the hub.
    """
    local = _local_managers(folders)
    tasks: dict[str, Task] = {}
    for name in names:
        manager = next((m for m in local if name in m.task_index), None) or _standard_folder(name)
        if manager is None and name in _standard_manager().task_index:
            manager = _standard_manager()
        if manager is None:
            in_folders = sorted({task for manager in local for task in manager.all_tasks})
            raise _unknown(name, in_folders, _standard_manager().all_tasks, folders)
        tasks.update(_load(name, manager))
    for task in tasks.values():
        _set_fewshot(task, num_fewshot)
    return tasks


def _local_managers(folders: TaskFolders) -> list[TaskManager]:
    managers = []
    for path in folders.paths:
        if not path.is_dir():
            raise ConfigError(f"no folder {path} of task files", path=str(path))
        managers.append(_manager(path))
    if folders.data is not None:
        if not folders.data.is_dir():
            raise ConfigError(f"no folder {folders.data} of evaluation sets", path=str(folders.data))
        managers.append(_manager(TASKS_FOLDER, folder=str(folders.data)))
    return managers


def _manager(path: Path, **metadata: Any) -> TaskManager:
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=str(path), include_defaults=False, metadata=metadata)


def _standard_folder(name: str) -> TaskManager | None:
    """Find a task in lm_eval's folders by its file name: fast, and enough for most tasks."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    for file in sorted(root.rglob(f"{glob.escape(name)}.yaml")):
        manager = _manager(file.parent)
        if name in manager.all_subtasks:
            return manager
    return None


@cache
def _standard_manager() -> TaskManager:
    """All of lm_eval's own tasks, groups and tags; reads about 15,000 files."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _load(name: str, manager: TaskManager) -> dict[str, Task]:
    try:
        with quiet():
            return manager.load([name])["tasks"]
    except SteplmError:
        raise
    except Exception as error:  # task files can contain anything, and their datasets can be anywhere
        raise _cannot_load(name, manager.task_index[name], error) from None


def _cannot_load(name: str, entry: Any, error: Exception) -> SteplmError:
    config = entry.cfg or {}
    dataset, where = config.get("dataset_path"), entry.yaml_path or "lm_eval"
    library = type(error).__module__.partition(".")[0]
    from_network = isinstance(error, OSError) or library in ("huggingface_hub", "datasets", "httpx", "requests")
    if dataset in FILE_BUILDERS and from_network:
        return DataError(f"cannot read the items of task {name!r} ({where}): {reason(error)}", task=name)
    if from_network:
        return HubUnavailable(
            f"task {name!r} needs {dataset or 'a data set'} of the hub, which did not return it ({reason(error)}). "
            f"Check the network, or use a local copy: a folder of sets (--tasks-data) for {', '.join(KNOWN_SETS)}; "
            "for another set a task file of your own (--tasks-path).",
            task=name,
        )
    return ConfigError(f"{where} makes no task {name!r}: {type(error).__name__}: {reason(error)}", task=name)


def _unknown(name: str, in_folders: Sequence[str], standard: Iterable[str], folders: TaskFolders) -> ConfigError:
    near = difflib.get_close_matches(name, sorted({*in_folders, *standard}), n=3)
    advice = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    if in_folders:
        shown = ", ".join(in_folders[:SHOWN_NAMES]) + (" …" if len(in_folders) > SHOWN_NAMES else "")
        advice += f" Tasks of the folders: {shown}."
    broken = [line for path in folders.paths for line in _unreadable(path)]
    if broken:
        advice += " Task files that cannot be read: " + "; ".join(broken) + "."
    return ConfigError(f"unknown task {name!r}.{advice}", task=name, near=near)


def _unreadable(folder: Path) -> list[str]:
    """Task files that lm_eval silently skips."""
    from lm_eval.tasks._index import TaskIndex

    lines = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            TaskIndex.entry_from_path(file)
        except Exception as error:  # task files can contain anything
            lines.append(f"{file} ({reason(error)})")
    return lines


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    """Set the number of few-shot examples as lm_eval does: a task configured with 0 keeps 0."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
