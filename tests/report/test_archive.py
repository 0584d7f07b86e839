"""Runs in one file: what is packed is reported as before, and a damaged archive is refused."""

from __future__ import annotations

import io
import random
import runpy
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from steplm.errors import SteplmError
from steplm.report.archive import ARCHIVE, pack
from steplm.report.summary import read_suite
from steplm.report.tables import all_tables


@pytest.fixture(scope="module")
def suite_dir(make_suite: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_suite(tmp_path_factory.mktemp("unpacked") / "kept", ("vanilla",), (0,))


@pytest.fixture
def packed(suite_dir: Path, tmp_path: Path) -> Path:
    (tmp_path / "kept").mkdir()
    pack(suite_dir, tmp_path / "kept" / ARCHIVE)
    return tmp_path / "kept"


def test_a_packed_suite_or_folder_of_runs_or_run_reads_as_it_did(packed: Path, suite_dir: Path, tmp_path: Path) -> None:
    assert read_suite(packed) == read_suite(suite_dir)
    for below in ("runs", "runs/vanilla/lr0.002-seed0"):
        folder = tmp_path / below
        folder.mkdir(parents=True)
        pack(suite_dir / below, folder / ARCHIVE)
        assert read_suite(folder) == read_suite(suite_dir / below)
    assert [path.name for path in packed.iterdir()] == [ARCHIVE]


def test_equal_files_give_an_equal_archive_whoever_wrote_them_and_when(
    packed: Path, suite_dir: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(suite_dir, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in copy.rglob("*.json"):
        path.chmod(0o600)
    pack(copy, tmp_path / ARCHIVE)
    assert (tmp_path / ARCHIVE).read_bytes() == (packed / ARCHIVE).read_bytes()


def test_a_kept_suite_has_its_readme_and_the_figures_that_were_asked_for_and_can_be_kept_again(
    suite_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_results = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/keep_results.py"))["main"]
    monkeypatch.chdir(tmp_path)
    archives = []
    for source in (suite_dir, "results/example"):
        arguments = [str(source), "results/example", "--command", "steplm compare example", "--figures", "q1_memory"]
        monkeypatch.setattr(sys, "argv", ["keep_results.py", *arguments])
        keep_results()
        archives.append(Path("results/example", ARCHIVE).read_bytes())
    assert archives[0] == archives[1]
    kept = {path.relative_to("results/example").as_posix() for path in Path("results/example").rglob("*.*")}
    assert kept == {"README.md", ARCHIVE, "figures/q1_memory.png"}
    readme = Path("results/example/README.md").read_text()
    assert all(table.markdown().strip() in readme for table in all_tables(read_suite(suite_dir)))
    assert "![q1_memory](figures/q1_memory.png)" in readme


def test_a_damaged_archive_is_refused_in_one_line(packed: Path) -> None:
    whole = (packed / ARCHIVE).read_bytes()
    generator = random.Random(0)
    flipped = bytearray(whole)
    flipped[generator.randrange(len(whole))] ^= 255
    for damaged in (b"", whole[: len(whole) // 2], bytes(flipped), generator.randbytes(500)):
        (packed / ARCHIVE).write_bytes(damaged)
        with pytest.raises(SteplmError, match=rf"{ARCHIVE} cannot be unpacked: .+\. It is damaged\.$") as caught:
            read_suite(packed)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "runs/../../outside.txt"])
def test_an_archive_never_writes_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / ARCHIVE, "w:xz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"here"))
    with pytest.raises(SteplmError, match=r"cannot be unpacked|holds neither"):
        read_suite(tmp_path)
    assert not list(tmp_path.parent.rglob("outside.txt"))
    assert not Path("/outside.txt").exists()
