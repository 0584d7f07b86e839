"""``runs.tar.xz``: a finished suite or run in one file, a thirtieth of its size."""

from __future__ import annotations

import lzma
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from steplm.errors import SteplmError
from steplm.units import reason

ARCHIVE = "runs.tar.xz"


def pack(folder: Path, archive: Path) -> None:
    """Archive every file below a folder; equal files give an equal archive."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())  # no owner, no time, mode 0644
            member.size = path.stat().st_size
            with path.open("rb") as content:
                tar.addfile(member, content)


@contextmanager
def unpacked(directory: Path) -> Iterator[Path]:
    """The directory itself or, if it has an archive, a temporary folder of the same name with the archive's content.

    Raises:
        SteplmError: the archive is damaged, or has files that would be written outside the folder.
    """
    archive = directory / ARCHIVE
    if not archive.is_file():
        yield directory
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / directory.resolve().name
        try:
            with tarfile.open(archive, "r:xz") as tar:
                tar.extractall(folder, filter="data")
        except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
            raise SteplmError(
                f"{archive} cannot be unpacked: {reason(error)}. It is damaged.", path=str(archive)
            ) from None
        yield folder
