"""Model evaluations saved as tables and figures, which a report shows next to training results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from steplm.files import write_atomically
from steplm.report.documents import parse_json, unusable
from steplm.report.tables import Table

SUFFIX = ".tables.json"
SEARCH_DEPTH = 4  # folder levels to search: a suite's runs are two levels down, their evaluations below them


@dataclass(frozen=True)
class Evaluation:
    """Tables and figures under one title, such as "Zero-shot tasks"."""

    title: str
    tables: tuple[Table, ...]
    figures: tuple[Path, ...] = ()

    def markdown(self, base: Path) -> str:
        """Render as Markdown, with figure paths relative to the folder ``base``."""
        pictures = [f"![{self.title}]({Path(os.path.relpath(figure, base)).as_posix()})\n" for figure in self.figures]
        return "\n".join([f"## {self.title}\n", *(table.markdown() for table in self.tables), *pictures])


def save_evaluation(folder: Path, name: str, evaluation: Evaluation) -> Path:
    """Write ``<name>.tables.json``; its figures must be in the same folder."""
    document = {
        "schema": 1,
        "title": evaluation.title,
        "tables": [asdict(table) for table in evaluation.tables],
        "figures": [figure.name for figure in evaluation.figures],
    }
    path = folder / f"{name}{SUFFIX}"
    write_atomically(path, json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def find_evaluations(folder: Path) -> list[Evaluation]:
    """Evaluations saved by ``save_evaluation`` in a folder or below it, sorted by title and path.

    Raises:
        SteplmError: a file cannot be read.
    """
    found = sorted(((_read(path), path) for path in _files(folder)), key=lambda pair: (pair[0].title, str(pair[1])))
    titles = [evaluation.title for evaluation, _ in found]
    result = []
    for evaluation, path in found:
        title = evaluation.title
        if titles.count(title) > 1:  # several models, each in its own folder
            title += f", {path.parent.relative_to(folder).as_posix()}"
        figures = tuple(path.parent / figure.name for figure in evaluation.figures)
        result.append(Evaluation(title, evaluation.tables, tuple(figure for figure in figures if figure.is_file())))
    return result


def _files(folder: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(folder):
        depth = len(Path(directory).relative_to(folder).parts)
        folders[:] = sorted(folders) if depth < SEARCH_DEPTH else []
        yield from (Path(directory) / name for name in files if name.endswith(SUFFIX))


def _read(path: Path) -> Evaluation:
    try:
        return TypeAdapter(Evaluation).validate_python(parse_json(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise unusable(path, error) from None
