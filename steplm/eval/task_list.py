"""Tasks by name: from local copies, from a folder of the user's, or from lm_eval's own list."""

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

# Builders of ``datasets`` that read local files; any other path is a name on the hub.
FILE_BUILDERS = ("json", "csv", "text", "parquet", "arrow", "xml", "pandas")
KNOWN_SETS = sorted(file.stem for file in TASKS_FOLDER.glob("*.yaml"))
SHOWN_NAMES = 12
_NAMES = re.compile(r"""^["']?(?:task|group)["']?[ \t]*:[ \t]*["']?([\w.-]+)""", re.MULTILINE)


@dataclass(frozen=True)
class TaskFolders:
    """Where tasks are looked for, before lm_eval's own list.

    Attributes:
        paths: folders of lm_eval task files (YAML). A file may name Python functions (``!function``): of the tasks
            that are asked for, and only of those, they are run. Whose files are here decides what runs.
        data: a folder with local copies of the sets that ``steplm/eval/tasks`` describes.
    """

    paths: tuple[Path, ...] = ()
    data: Path | None = None


def check_names(names: Sequence[str], folders: TaskFolders) -> None:
    """Refuse a name that no task, group or tag has, in about a second: lm_eval's list takes ten to read.

    Raises:
        ConfigError: no such folder, or no such task (with near names).
    """
    in_folders = {name for manager in _local_managers(folders) for name in manager.task_index}
    for name in names:
        if name not in in_folders and not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", _standard_text()):
            raise _unknown(name, sorted(in_folders), _NAMES.findall(_standard_text()), folders)


@cache
def _standard_text() -> str:
    """What lm_eval's own task files say, together: a name that does not occur in it is no name of its list."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    files = (file for file in root.rglob("*") if file.suffix in (".yaml", "") and file.is_file())  # "": included ones
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def load_tasks(names: Sequence[str], folders: TaskFolders, num_fewshot: int | None = None) -> dict[str, Task]:
    """The tasks by name, with their items; groups and tags become the tasks that they stand for.

    lm_eval's whole list takes ten seconds or more to read: only for a name that is found in no other way.

    Raises:
        ConfigError: no such folder, no such task (with near names), or a task file that makes no task.
        DataError: items that are missing or unusable.
        HubUnavailable: a set on the hub that cannot be had.
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
    """The folder of lm_eval's own where a file of this name describes this task, as it is for most: found at once."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    for file in sorted(root.rglob(f"{glob.escape(name)}.yaml")):
        manager = _manager(file.parent)
        if name in manager.all_subtasks:
            return manager
    return None


@cache
def _standard_manager() -> TaskManager:
    """All of lm_eval's own tasks, groups and tags: some 15,000 files are read."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _load(name: str, manager: TaskManager) -> dict[str, Task]:
    try:
        with quiet():
            return manager.load([name])["tasks"]
    except SteplmError:
        raise
    except Exception as error:  # a task file can say anything, and its set can be anywhere
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
    """The task files that lm_eval passes over without a word."""
    from lm_eval.tasks._index import TaskIndex

    lines = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            TaskIndex.entry_from_path(file)
        except Exception as error:  # as above
            lines.append(f"{file} ({reason(error)})")
    return lines


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    """As lm_eval does: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
