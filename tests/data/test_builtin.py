"""The corpus that needs no download."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from steplm.data import builtin


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library and packages of a few files."""
    docstring = "This sentence is long enough to be taken, as it has far more than eighty characters in it. "
    files = {
        "stdlib/pydoc_data/topics.py": f"topics = {{'lambda': {'A help topic. ' * 9!r}, 'x': 'short'}}",
        "stdlib/module.py": f'"""Module. {docstring}"""\nraise SystemExit("imported")\n',
        "stdlib/test/skipped.py": f'"""Test. {docstring}"""',
        "packages/good/__init__.py": (
            f'class A:\n    """Class. {docstring}"""\n    def f(self):\n        """Method. {docstring}"""\n'
            'def g():\n    """Too short."""\n'
        ),
        "packages/good/copy.py": f'"""Class. {docstring}"""',
        "packages/broken.py": 'def """',
        "packages/latin.py": '"""\udce9"""',
        "packages/good-1.0.dist-info/METADATA": f"Name: good\nVersion: 1.0\n\n# Good\n{docstring}",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    folders = {"stdlib": str(tmp_path / "stdlib"), "purelib": str(tmp_path / "packages")}
    monkeypatch.setattr(builtin.sysconfig, "get_path", folders.__getitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    builtin.python_docs.cache_clear()
    yield tmp_path
    builtin.python_docs.cache_clear()


def test_docstrings_topics_and_package_pages_are_taken_and_nothing_is_imported(environment: Path) -> None:
    heads = [text.split("\n")[0] for text in builtin.python_docs()]
    assert [head[:12] for head in heads] == ["A help topic", "module", "good.A", "# Good"]
    assert "good.A.f\n\nMethod." in builtin.python_docs()[2]
    assert "Too short" not in "".join(builtin.python_docs())


def test_the_corpus_stops_at_its_limit(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "MAX_TEXT_BYTES", 400)
    assert 0 < sum(len(text.encode()) for text in builtin.python_docs()) <= 400


def test_the_description_changes_when_a_package_is_installed(environment: Path) -> None:
    before = builtin.describe_python_docs()
    assert before == builtin.describe_python_docs()
    (environment / "packages" / "new-2.0.dist-info").mkdir()
    assert builtin.describe_python_docs() != before


def test_the_corpus_is_collected_once_for_an_environment(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected = builtin.python_docs()
    calls: list[int] = []
    collect = builtin._collected
    monkeypatch.setattr(builtin, "_collected", lambda: (calls.append(1), collect())[1])

    def again() -> int:
        builtin.python_docs.cache_clear()
        assert builtin.python_docs() == collected
        return len(calls)

    assert again() == 0
    (kept,) = (environment / "cache" / "steplm").iterdir()
    for damage in ("[", "[]", "[1]", "{}"):
        kept.write_text(damage)
        before = len(calls)
        assert again() == before + 1
    (environment / "packages" / "new-2.0.dist-info").mkdir()
    assert again() == len(calls) == 5


def test_a_home_that_cannot_be_written_to_keeps_nothing(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (environment / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(environment / "file"))
    assert len(builtin.python_docs()) == 4


def test_this_installation_has_prose_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builtin, "MAX_TEXT_BYTES", 300_000)
    builtin.python_docs.cache_clear()
    documents = builtin.python_docs()
    builtin.python_docs.cache_clear()
    assert 200_000 < sum(len(text.encode()) for text in documents) <= 300_000
    assert len(set(documents)) == len(documents)
    assert "antigravity" not in sys.modules
