"""Write files atomically, safe against power failures and full disks, hash them, and make text encodable as UTF-8."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steplm.errors import WriteError

_REFUSALS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip
_UNKNOWN = "a write failed"
_SURROGATES = re.compile("[\ud800-\udfff]")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` with this content; readers see either the old or the new file, even after a crash.

    Raises:
        WriteError: the file system refuses to write.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(as_unicode(content).encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` for a new file or folder, which replaces ``path`` at the end.

    On any failure, ``path`` is unchanged and the temporary path is removed.

    Raises:
        WriteError: the file system refuses to write.
    """
    temporary = path.with_name(f".{path.name}.writing")
    with write_errors(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            remove(temporary)
            yield temporary
            for file in temporary.rglob("*"):
                sync(file)
            sync(temporary)
            if temporary.is_dir():  # unlike a file, a folder cannot be renamed to an existing path
                remove(path)
            os.replace(temporary, path)
            sync(path.parent)  # the rename is stored in the folder
        except BaseException:
            remove(temporary)
            raise


@contextmanager
def write_errors(*paths: Path) -> Iterator[None]:
    """Turn file system errors while writing ``paths`` into a ``WriteError`` with the file and the reason."""
    try:
        yield
    except Exception as error:
        why = refusal(error)
        file = getattr(error, "filename", None)
        if why is None or (isinstance(file, str) and not any(_is_on_the_way(Path(file), path) for path in paths)):
            raise
        inside = isinstance(file, str) and Path(file).is_relative_to(paths[0])
        named = file if inside else paths[0]
        raise WriteError(f"cannot write {named}: {why}{_way_out(why, paths[0])}", path=str(named), why=why) from None


def _is_on_the_way(file: Path, path: Path) -> bool:
    """Whether ``file`` is inside the folder ``path``, or is one of its parent folders."""
    file, path = file.absolute(), path.absolute()
    return file.is_relative_to(path) or path.is_relative_to(file)


def refusal(error: Exception) -> str | None:
    """Why the file system refused to write, even if a library has wrapped the error; None for other errors."""
    if isinstance(error, WriteError):
        return error.details.get("why")
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _REFUSALS else None
    text = str(error)
    if "inline_container.cc" in text:  # torch.save, which does not say why
        return _UNKNOWN
    # safetensors and tokenizers: "... File too large (os error 27)"
    return next((os.strerror(number) for number in _REFUSALS if f"(os error {number})" in text), None)


def _way_out(why: str, path: Path) -> str:
    if why not in (_UNKNOWN, os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)):
        return ""
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    return f" ({free:,} bytes are free in {folder}): free some space, and run the same command again"


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents; it need not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded as UTF-8: JSON escapes and terminals can produce lone surrogates."""
    return _SURROGATES.search(text) is None


def as_unicode(text: str) -> str:
    """Replace each lone surrogate with U+FFFD."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
