"""A corpus that needs no download: the documentation of the standard library and the installed packages.

Source files are parsed, never imported, so no code runs and the order is that of the files.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from steplm.files import is_unicode, write_atomically

MIN_DOCSTRING_CHARACTERS = 80
MAX_TEXT_BYTES = 10_000_000  # keeps the parsing of a large environment within ten seconds
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "_vendor", "encodings", "lib2to3"}
_Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@lru_cache(maxsize=1)
def python_docs() -> tuple[str, ...]:
    """One document per module (its longer docstrings, each under its name), help topic, or package description.

    No two passages are equal. The same environment always gives the same documents in the same order. Collecting them
    takes ten seconds, so they are cached in the user's cache folder.
    """
    path = _kept_at()
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(kept, list) and kept and all(isinstance(text, str) for text in kept):
            return tuple(kept)
    documents = _collected()
    with suppress(OSError):  # a read-only home directory
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(documents))
    return documents


def _kept_at() -> Path:
    """The cache file; its name depends on the environment and on the source of this module."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    rules = Path(__file__).read_bytes() + repr(MAX_TEXT_BYTES).encode()
    where = f"{sysconfig.get_path('stdlib')} {_site_packages()} {describe_python_docs()}".encode()
    return Path(cache) / "steplm" / f"python-docs-{hashlib.sha256(rules + where).hexdigest()[:16]}.json"


def _collected() -> tuple[str, ...]:
    documents: list[str] = []
    num_bytes = 0
    for text in _candidates(set()):
        num_bytes += len(text.encode())
        if num_bytes > MAX_TEXT_BYTES:
            break
        documents.append(text)
    return tuple(documents)


def describe_python_docs() -> str:
    """A description that changes whenever Python or an installed package changes."""
    names = "\n".join(sorted(path.name for path in _site_packages().glob("*.dist-info")))
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    return f"builtin://python-docs (Python {sys.version.split()[0]}, packages {digest})"


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _candidates(seen: set[str]) -> Iterator[str]:
    standard_library, packages = Path(sysconfig.get_path("stdlib")), _site_packages()
    yield from _topics(standard_library, seen)
    for folder in (standard_library, packages):
        for path in _source_files(folder):
            text = _module_text(path, ".".join(path.relative_to(folder).with_suffix("").parts), seen)
            if text:
                yield text
        for path in sorted(folder.glob("*.dist-info/METADATA")):
            # The long description follows the first blank line of the headers.
            metadata = path.read_bytes().decode(errors="ignore").replace("\r\n", "\n")
            text = metadata.partition("\n\n")[2].strip()
            if _is_wanted(text, seen):
                yield text


def _source_files(folder: Path) -> list[Path]:
    relative = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return sorted(folder / path for path in relative if not _SKIPPED_FOLDERS.intersection(path.parts))


def _module_text(path: Path, module: str, seen: set[str]) -> str:
    tree = _parsed(path)
    if tree is None:
        return ""
    passages = []
    for name, node in _definitions(tree, module.removesuffix(".__init__")):
        docstring = ast.get_docstring(node)
        if _is_wanted(docstring, seen):
            passages.append(f"{name}\n\n{docstring}")
    return "\n\n".join(passages)


def _definitions(node: _Node, name: str) -> Iterator[tuple[str, _Node]]:
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{name}.{child.name}")


def _topics(standard_library: Path, seen: set[str]) -> Iterator[str]:
    """Yield the help topics (``help("LAMBDAS")``) from the module that stores them in one dict."""
    path = standard_library / "pydoc_data" / "topics.py"
    tree = _parsed(path) if path.is_file() else None
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    text = value.value.strip()
                    if _is_wanted(text, seen):
                        yield text


def _parsed(path: Path) -> ast.Module | None:
    try:
        data = path.read_bytes()
        # Parsing dominates the time, and files without a triple quote rarely have a long docstring.
        if b'"""' not in data and b"'''" not in data and path.name != "topics.py":
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(data)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_wanted(text: str | None, seen: set[str]) -> bool:
    """Whether a passage is long enough and new; it is then seen."""
    if text is None or len(text) <= MIN_DOCSTRING_CHARACTERS or text in seen:
        return False
    seen.add(text)
    return is_unicode(text)
