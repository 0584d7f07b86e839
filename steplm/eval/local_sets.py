"""Readers of local evaluation datasets for the task files in ``tasks/``.

A task file says ``custom_dataset: !function steplm.eval.local_sets.<reader>`` and gives the reader's arguments in
``dataset_kwargs``; the folder comes from the task manager's ``metadata``. Every record is validated, so that a missing
column gives a clear error here rather than a failure inside a template.
"""

from __future__ import annotations

import bz2
import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm.data.formats import first_error, parse_json
from steplm.errors import DataError
from steplm.files import is_unicode
from steplm.units import reason, shortened

if TYPE_CHECKING:
    from datasets import Dataset

TASKS_FOLDER = Path(__file__).parent / "tasks"
SPLIT = "test"
PACKED: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open}
HELLASWAG_LINES = 6  # context, label, four endings

Record = dict[str, Any]
Fields = dict[str, Callable[[Any], bool]]


def last_word(*, folder: str, file: str | list[str], **_: Any) -> dict[str, Dataset]:
    """Read records of ``context`` and ``continuation``, or of ``text`` (LAMBADA)."""
    return _as_split(folder, file, {"context": _is_text, "continuation": _is_text})


def multiple_choice(*, folder: str, file: str | list[str], prefix: str = "", **_: Any) -> dict[str, Dataset]:
    """Read records of ``query``, ``choices`` and ``gold``, or a dataset's published format (``PUBLISHED``).

    Args:
        prefix: prepended to the query of a published record.
    """
    fields: Fields = {"query": _is_text, "choices": _is_choices, "gold": _is_index}
    return _as_split(folder, file, fields, chosen_from="choices", prefix=prefix)


def partial_scoring(*, folder: str, file: str | list[str], **_: Any) -> dict[str, Dataset]:
    """Read records of ``context_options``, their shared ``continuation`` and ``gold``, or WinoGrande's own format."""
    fields: Fields = {"context_options": _is_choices, "continuation": _is_text, "gold": _is_index}
    return _as_split(folder, file, fields, chosen_from="context_options")


def hellaswag_lines(*, folder: str, file: str | list[str], **_: Any) -> dict[str, Dataset]:
    """Read HellaSwag: text with six lines per item (context, index of the right ending, four endings), or records."""
    path = _find(folder, file)
    if ".txt" not in path.suffixes:
        return multiple_choice(folder=folder, file=file)
    return {SPLIT: _dataset(path, _hellaswag_records(path))}


# --- published record formats -----------------------------------------------------------------------------


def _from_text(record: Record) -> Record:
    context, _, word = record["text"].rpartition(" ")
    return {"context": context, "continuation": f" {word}"}


def _from_answer_key(record: Record) -> Record:
    """ARC and OpenBookQA: the original files nest the choices in the question; the hub has two lists."""
    question = record.get("question_stem", record.get("question"))
    if isinstance(question, dict):
        choices = question["choices"]
        texts, labels = [choice["text"] for choice in choices], [choice["label"] for choice in choices]
        question = question["stem"]
    else:
        texts, labels = record["choices"]["text"], record["choices"]["label"]
    if len(texts) != len(set(labels)):
        raise ValueError(f"{len(texts)} choices, {len(set(labels))} different labels")
    return {"query": question, "choices": texts, "gold": labels.index(record["answerKey"].strip())}


def _from_piqa(record: Record) -> Record:
    return {"query": record["goal"], "choices": [record["sol1"], record["sol2"]], "gold": record["label"]}


def _from_copa(record: Record) -> Record:
    connector = {"cause": "because", "effect": "therefore"}[record["question"]]
    choices = [f" {text[0].lower()}{text[1:]}" for text in (record["choice1"], record["choice2"])]
    return {"query": f"{record['premise'].strip()[:-1]} {connector}", "choices": choices, "gold": record["label"]}


def _from_boolq(record: Record) -> Record:
    query = f"{record['passage']}\nQuestion: {record['question']}?"
    answer = record["label"] if "label" in record else record["answer"]
    return {"query": query, "choices": ["no", "yes"], "gold": _whole(answer)}


def _from_winogrande(record: Record) -> Record:
    before, _, after = record["sentence"].partition("_")
    options = [before + record[name] for name in ("option1", "option2")]
    return {"context_options": options, "continuation": after.strip(), "gold": ["1", "2"].index(record["answer"])}


def _from_hellaswag(record: Record) -> Record:
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    choices = [_without_brackets(ending) for ending in record["endings"]]
    return {"query": _without_brackets(context), "choices": choices, "gold": _whole(record["label"])}


def _whole(value: Any) -> int:
    """The index of an answer, given as an integer, text or a boolean; ``int`` alone would truncate 0.7 to 0."""
    if isinstance(value, float):
        raise TypeError(f"{value} is no whole number")
    return int(value)


# Columns that identify a published format, and its converter, which follows lm_eval's own task.
PUBLISHED: dict[tuple[str, ...], Callable[[Record], Record]] = {
    ("question", "answerKey"): _from_answer_key,
    ("question_stem", "choices", "answerKey"): _from_answer_key,
    ("goal", "sol1", "sol2", "label"): _from_piqa,
    ("premise", "choice1", "choice2", "question", "label"): _from_copa,
    ("passage", "question", "label"): _from_boolq,
    ("passage", "question", "answer"): _from_boolq,
    ("sentence", "option1", "option2", "answer"): _from_winogrande,
    ("activity_label", "ctx_a", "ctx_b", "endings", "label"): _from_hellaswag,
}


def hellaswag_query(context: str) -> str:
    """Format a context as lm_eval does.

    lm_eval capitalizes the unfinished sentence that the endings continue ("He", not "he"). Only contexts from video
    captions have one: it follows their last full sentence and does not end with a period.
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
    """Remove WikiHow markup: ``[title]`` ends a sentence, and anything else in brackets is not text."""
    sentences = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", sentences).replace("  ", " ")


# --- files ------------------------------------------------------------------------------------------------


def _find(folder: str, file: str | list[str]) -> Path:
    """The first of the files that exists in the folder, compressed or not."""
    files = [file] if isinstance(file, str) else file
    for name in files:
        for suffix in PACKED:
            path = Path(folder) / f"{name}{suffix}"
            if path.is_file():
                return path
    raise DataError(
        f"no file {' or '.join(str(Path(folder) / name) for name in files)} (nor .gz, .bz2): the set of this task is "
        "not in the folder",
        folder=folder,
        file=files[0],
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    open_file = PACKED.get(path.suffix, open)
    try:
        with open_file(path, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.rstrip("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {reason(error)}", path=str(path)) from None


def _records(path: Path, fields: Fields, chosen_from: str, prefix: str) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            parsed = parse_json(line)
            if error := first_error([parsed]):
                raise error
            record = _unified(parsed, fields, prefix)
            _check(record, fields, chosen_from)
        except ValueError as error:
            raise DataError(f"{where}: {error}", path=str(path), line=number) from None
        yield {name: record[name] for name in fields}


def _unified(record: Any, fields: Fields, prefix: str) -> Record:
    """A record with the expected fields, converted if it has a published format."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, not {shortened(record)}")
    published = {("text",): _from_text} if "context" in fields and "context" not in record else PUBLISHED
    convert = next((convert for columns, convert in published.items() if all(c in record for c in columns)), None)
    if convert is None or all(name in record for name in fields):
        return record
    try:
        unified = convert(record)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"no right answer, or a value that cannot be: {shortened(record)} ({error})") from None
    return {**unified, "query": prefix + unified["query"]} if "query" in unified else unified


def _check(record: Record, fields: Fields, chosen_from: str) -> None:
    for name, is_right in fields.items():
        if name not in record:
            raise ValueError(f"no field {name!r} (its fields: {', '.join(sorted(record)) or 'none'})")
        if not is_right(record[name]):
            raise ValueError(f"{name!r} must be {EXPECTED[is_right]}, not {shortened(record[name])}")
    if chosen_from and record["gold"] >= len(record[chosen_from]):
        raise ValueError(f"gold is {record['gold']}, but there are {len(record[chosen_from])} {chosen_from}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def _is_choices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(_is_text(choice) for choice in value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


EXPECTED: dict[Callable[[Any], bool], str] = {
    _is_text: "a text that is not empty and has no lone surrogate",
    _is_choices: "two texts or more, none empty",
    _is_index: "a number from 0",
}


def _as_split(
    folder: str, file: str | list[str], fields: Fields, *, chosen_from: str = "", prefix: str = ""
) -> dict[str, Dataset]:
    path = _find(folder, file)
    return {SPLIT: _dataset(path, _records(path, fields, chosen_from, prefix))}


def _dataset(path: Path, records: Iterator[Record]) -> Dataset:
    from datasets import Dataset

    items = list(records)
    if not items:
        raise DataError(f"{path} is empty: no item to be scored on", path=str(path))
    return Dataset.from_list(items)
