"""Evaluation sets in local files, as the task files beside this module name them.

A task file says ``custom_dataset: !function steplm.eval.local_sets.<reader>`` and gives the reader's arguments in
``dataset_kwargs``; the folder comes from the task manager's ``metadata``. Each record is checked: a set with a missing
column ends with one message, not inside a template.
"""

from __future__ import annotations

import bz2
import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm.errors import DataError
from steplm.units import reason, shortened

if TYPE_CHECKING:
    from datasets import Dataset

TASKS_FOLDER = Path(__file__).parent / "tasks"
SPLIT = "test"
PACKED: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open}
HELLASWAG_LINES = 6  # context, label, four endings

Record = dict[str, Any]
Fields = dict[str, Callable[[Any], bool]]


def last_word(*, folder: str, file: str, **_: Any) -> dict[str, Dataset]:
    """Records ``context`` and ``continuation``, one JSON object a line (LAMBADA)."""
    path = _find(folder, file)
    return _as_split(path, _records(path, {"context": _is_text, "continuation": _is_text}))


def multiple_choice(*, folder: str, file: str, **_: Any) -> dict[str, Dataset]:
    """Records ``query``, ``choices`` and ``gold``, one JSON object a line (PIQA, ARC)."""
    path = _find(folder, file)
    fields: Fields = {"query": _is_text, "choices": _is_choices, "gold": _is_index}
    return _as_split(path, _records(path, fields, chosen_from="choices"))


def partial_scoring(*, folder: str, file: str, **_: Any) -> dict[str, Dataset]:
    """Records ``context_options``, ``continuation`` and ``gold``: contexts compete for one end (WinoGrande)."""
    path = _find(folder, file)
    fields: Fields = {"context_options": _is_choices, "continuation": _is_text, "gold": _is_index}
    return _as_split(path, _records(path, fields, chosen_from="context_options"))


def hellaswag_lines(*, folder: str, file: str, **_: Any) -> dict[str, Dataset]:
    """Text with six lines an item: context, number of the right ending, four endings (HellaSwag)."""
    path = _find(folder, file)
    return _as_split(path, _hellaswag_records(path))


def hellaswag_query(context: str) -> str:
    """The context as lm_eval words it.

    The half sentence that the endings go on from begins with a capital there ("He", not "he"). Only contexts from
    video captions end in one, without a full stop; what comes after their last sentence is it.
    """
    half = None if context.endswith(".") else re.fullmatch(r"(.*[.!?][\"')]*) (.*)", context, re.DOTALL)
    return _without_brackets(context if half is None else f"{half[1]} {half[2].capitalize()}")


def _hellaswag_records(path: Path) -> Iterator[Record]:
    lines = [line for _, line in _lines(path)]
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) % HELLASWAG_LINES:
        raise DataError(
            f"{path} has {len(lines):,} lines, not {HELLASWAG_LINES} an item: context, label, four endings",
            path=str(path),
            num_lines=len(lines),
        )
    for start in range(0, len(lines), HELLASWAG_LINES):
        context, label, *endings = lines[start : start + HELLASWAG_LINES]
        if not label.isdigit() or int(label) >= len(endings):
            raise DataError(
                f"{path}, line {start + 2}: expected the number of the right ending, 0 to 3, not {shortened(label)}",
                path=str(path),
                line=start + 2,
            )
        choices = [_without_brackets(ending) for ending in endings]
        yield {"query": hellaswag_query(context), "choices": choices, "gold": int(label)}


def _without_brackets(text: str) -> str:
    """WikiHow's mark-up goes: ``[title]`` ends a sentence, whatever else is in brackets was no text."""
    sentences = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", sentences).replace("  ", " ")


# --- files ------------------------------------------------------------------------------------------------


def _find(folder: str, file: str) -> Path:
    """The file in the folder, packed or not."""
    for suffix in PACKED:
        path = Path(folder) / f"{file}{suffix}"
        if path.is_file():
            return path
    raise DataError(
        f"no file {Path(folder) / file} (nor .gz, .bz2): the set of this task is not in the folder",
        folder=folder,
        file=file,
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    open_file = PACKED.get(path.suffix, open)
    try:
        with open_file(path, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.rstrip("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {reason(error)}", path=str(path)) from None


def _records(path: Path, fields: Fields, chosen_from: str = "") -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is no JSON: {reason(error)}", path=str(path), line=number) from None
        known = sorted(record) if isinstance(record, dict) else []
        for name, is_right in fields.items():
            if name not in known:
                has = ", ".join(known) or "none"
                raise DataError(f"{where} has no field {name!r} (its fields: {has})", path=str(path), line=number)
            if not is_right(record[name]):
                raise DataError(
                    f"{where}: {name!r} must be {EXPECTED[is_right]}, not {shortened(record[name])}",
                    path=str(path),
                    line=number,
                )
        if chosen_from and record["gold"] >= len(record[chosen_from]):
            raise DataError(
                f"{where}: gold is {record['gold']}, but there are {len(record[chosen_from])} {chosen_from}",
                path=str(path),
                line=number,
            )
        yield {name: record[name] for name in fields}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_choices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(_is_text(choice) for choice in value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


EXPECTED: dict[Callable[[Any], bool], str] = {
    _is_text: "a text that is not empty",
    _is_choices: "two texts or more, none empty",
    _is_index: "a number from 0",
}


def _as_split(path: Path, records: Iterator[Record]) -> dict[str, Dataset]:
    from datasets import Dataset

    items = list(records)
    if not items:
        raise DataError(f"{path} is empty: no item to be scored on", path=str(path))
    return {SPLIT: Dataset.from_list(items)}
