"""What the fuzz tests share: how files are spoiled, and the claim that every try must meet.

The claim: whatever a file holds, steplm ends in success or in one of its own errors with a message of a few lines.
It hangs nowhere, writes only where it was told to, and executes nothing that a file says.

The normal suite makes a few tries of each test, always the same ones. For more, at random:

    STEPLM_FUZZ_TRIES=1000 pytest tests/fuzz                 # tries of each test
    STEPLM_FUZZ_TRIES=1000 pytest tests/fuzz --hypothesis-seed=7
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from steplm.errors import SteplmError

TRIES = int(os.environ.get("STEPLM_FUZZ_TRIES", "0"))
MOST_LINES, MOST_CHARACTERS = 30, 6000  # of a message
MOST_SECONDS = 20  # of the processor, for one try
settings.register_profile(
    "fuzz",
    max_examples=TRIES or 30,
    derandomize=not TRIES,
    database=None,
    deadline=None,  # the claim counts the processor's seconds, which a busy machine does not change
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

outcomes: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(300 + 5 * TRIES))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if outcomes:
        listing = ", ".join(f"{name} {count:,}" for name, count in outcomes.most_common())
        terminalreporter.write_line(f"fuzz: {sum(outcomes.values()):,} tries ended in {listing}")


# What may not happen while a file is read. An audit hook cannot be taken out again, so it sleeps between the tries.

STARTS_A_PROGRAM = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen"}
OTHERWISE_FORBIDDEN = {"pickle.find_class", "socket.connect", "socket.getaddrinfo"}
CHANGES_A_PATH = {  # event -> places of the paths among its arguments
    "os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "shutil.rmtree": (0,),
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(BaseException):
    """No ``Exception``, so that nobody handles it by the way."""


class Guard:
    def __init__(self) -> None:
        self.folders: tuple[Path, ...] | None = None  # None: asleep
        self.broken: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folders is None:
            return
        if event in STARTS_A_PROGRAM or event in OTHERWISE_FORBIDDEN:
            self.refuse(event, arguments)
        elif event == "open":
            path, _, flags = arguments
            if flags & WRITES:
                self.require_inside(event, path)
        elif event in CHANGES_A_PATH:
            for place in CHANGES_A_PATH[event]:
                self.require_inside(event, arguments[place], arguments[-1])
        elif event == "exec" and sys._getframe(1).f_globals.get("__name__", "").startswith("steplm"):
            self.refuse(event, arguments)

    def require_inside(self, event: str, path: Any, descriptor: Any = None) -> None:
        """``descriptor``: of the folder that a relative path is in, if a number, and not -1."""
        if isinstance(path, int) or self.folders is None:
            return
        name = os.fsdecode(path)
        if isinstance(descriptor, int) and descriptor >= 0 and not name.startswith("/"):
            name = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), name)
        absolute = Path(os.path.abspath(name))
        allowed = absolute == Path(os.devnull) or "__pycache__" in absolute.parts
        allowed |= event == "os.mkdir" and absolute.is_dir()  # creates nothing
        if not allowed and not any(absolute.is_relative_to(folder) for folder in self.folders):
            self.refuse(event, (str(absolute),))

    def refuse(self, event: str, arguments: tuple[Any, ...]) -> None:
        self.broken.append(f"{event}{arguments!r:.300}")
        raise Forbidden(self.broken[-1])


guard = Guard()
sys.addaudithook(guard.hook)


def forbidden(name: str) -> Callable[..., None]:
    def refuse(*args: object, **kwargs: object) -> None:
        guard.refuse(name, args)

    return refuse


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way from a file to running code that the libraries around us offer."""
    for module, names in {
        pickle: ("load", "loads", "Unpickler"),
        torch: ("load",),
        yaml: ("full_load", "unsafe_load", "unsafe_load_all"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, forbidden(f"{module.__name__}.{name}"))
    for loader in (yaml.FullLoader, yaml.UnsafeLoader, yaml.Loader):
        monkeypatch.setattr(loader, "__init__", forbidden(f"yaml.{loader.__name__}"))


Claim = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="session")
def claim() -> Claim:
    """``with claim(folder, ...):`` success or one clear error, and nothing written outside these folders."""

    @contextmanager
    def watch(*folders: Path) -> Iterator[None]:
        guard.folders, guard.broken = tuple(Path(os.path.abspath(folder)) for folder in folders), []
        started_at = time.process_time()
        try:
            yield
            outcomes["success"] += 1
        except SteplmError as error:
            guard.folders = None
            outcomes[type(error).__name__] += 1
            message = str(error)
            message.encode()  # it can be printed
            assert message.strip(), "an error without a word"
            assert len(message.splitlines()) <= MOST_LINES, message[:2000]
            assert len(message) <= MOST_CHARACTERS, message[:2000]
            assert "Traceback" not in message
        finally:
            guard.folders = None
        assert not guard.broken
        assert time.process_time() - started_at < MOST_SECONDS, "all but a hang"

    return watch


@pytest.fixture(scope="session")
def fresh_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], AbstractContextManager[Path]]:
    """``with fresh_folder() as folder:`` one for each try."""
    root = tmp_path_factory.mktemp("tries")

    @contextmanager
    def make() -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=root) as name:
            yield Path(name)

    return make


# How files are spoiled.


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ODD_NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.sampled_from([0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]),
    st.integers(),
    st.floats(),
)
ODD_TEXTS = st.one_of(
    st.sampled_from(
        [
            "", " ", ".", "..", "../../outside", "/outside", "~nobody/x", "a\0b", "x" * 5000, "\ud800", "auto", "none",
            "1e999", "24GiB", "-1", "NaN", "0x10", "1_000", "${HOME}", "${UNSET_VARIABLE}", "!!python/name:os.system",
            "__import__('os').system('true')", "hub://[", "builtin://python-docs?", "[bold]red[/]", "2001-99-99",
        ]
    ),
    st.text(max_size=20),
)  # fmt: skip
ODD_VALUES = st.one_of(
    ODD_NUMBERS,
    ODD_TEXTS,
    st.sampled_from([None, True, False, [], {}, [[]], [None], {"": 1}, {"a": {"b": []}}]),
    st.just(nested(60)),
    st.lists(ODD_NUMBERS, max_size=4),
).map(copy.deepcopy)  # what is drawn may be changed afterwards


def _places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value in a document, the whole of it first; of long lists, only the first few."""
    yield here
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _places(child, (*here, key))
    elif isinstance(value, list):
        for index, child in enumerate(value[:4]):
            yield from _places(child, (*here, index))


def _alike(value: int | float) -> list[int | float]:
    """Numbers that the same key could have, with more right than most odd ones."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [-value, value + 1, value - 1, 2 * value, value // 2, 1, 7, 64, 1000, 1_000_000, 2**40]
    return [-value, value / 2, value * 2, value * 1e-9, value * 1e9, 0.0, 0.5, 1.0]


@pytest.fixture(scope="session")
def spoil_json() -> Callable[[st.DataObject, Any], Any]:
    """``spoil_json(data, document)``: a copy in which one to three values are others, gone, or under another key."""

    def spoil(data: st.DataObject, document: Any) -> Any:
        document = copy.deepcopy(document)
        for _ in range(data.draw(st.integers(1, 3), label="changes")):
            # The whole comes first among the places, and is rarely the one: shrinking should not end there.
            place = data.draw(st.sampled_from(list(_places(document))[::-1]), label="place")
            if not place:
                return data.draw(ODD_VALUES, label="whole document")
            parent = document
            for key in place[:-1]:
                parent = parent[key]
            change = data.draw(
                st.sampled_from(["replace", "alike", "alike", "delete", "rename", "repeat"]), label="change"
            )
            value = parent[place[-1]]
            if change == "delete":
                del parent[place[-1]]
            elif change == "rename" and isinstance(parent, dict):
                parent[data.draw(ODD_TEXTS, label="key")] = parent.pop(place[-1])
            elif change == "alike" and isinstance(value, int | float):
                parent[place[-1]] = data.draw(st.sampled_from(_alike(value)), label="value")
            elif change == "repeat" and isinstance(value, list):
                parent[place[-1]] = value * 2
            else:
                parent[place[-1]] = data.draw(ODD_VALUES, label="value")
        return document

    return spoil


@pytest.fixture(scope="session")
def spoil_bytes() -> Callable[[st.DataObject, bytes], bytes]:
    """``spoil_bytes(data, content)``: cut off, bits flipped, parts overwritten, doubled or removed, or other bytes."""

    def spoil(data: st.DataObject, content: bytes) -> bytes:
        change = data.draw(st.sampled_from(["flip", "cut", "overwrite", "remove", "insert", "zeros", "other", "deep"]))
        if change == "deep":
            return data.draw(st.sampled_from([b"[", b'{"a":', b"- ", b"{a: "]), label="bracket") * 20_000
        if change == "other" or not content:
            return data.draw(st.binary(max_size=300), label="content")
        # Headers are what readers trust, and are short.
        end = len(content) if data.draw(st.booleans(), label="anywhere") else min(len(content), 200)
        start = data.draw(st.integers(0, end - 1), label="start")
        if change == "cut":
            return content[:start]
        if change == "flip":
            spoiled = bytearray(content)
            spoiled[start] ^= 1 << data.draw(st.integers(0, 7), label="bit")
            return bytes(spoiled)
        length = data.draw(st.integers(1, 64), label="length")
        filling = b"\0" * length if change == "zeros" else data.draw(st.binary(max_size=64), label="filling")
        if change == "insert":
            return content[:start] + filling + content[start:]
        return content[:start] + (b"" if change == "remove" else filling) + content[start + length :]

    return spoil


@pytest.fixture(scope="session")
def spoil_file(
    spoil_json: Callable[[st.DataObject, Any], Any], spoil_bytes: Callable[[st.DataObject, bytes], bytes]
) -> Callable[[st.DataObject, Path], None]:
    """``spoil_file(data, file)``: as JSON where it, or its header, is JSON; at times, and any other file, as bytes."""

    def spoil(data: st.DataObject, file: Path) -> None:
        content = file.read_bytes()
        start, end = (8, 8 + int.from_bytes(content[:8], "little")) if file.suffix == ".safetensors" else (0, None)
        try:
            document = json.loads(content[start:end])
        except ValueError:
            document = None
        if document is None or data.draw(st.integers(0, 3), label="as bytes") == 0:
            file.write_bytes(spoil_bytes(data, content))
            return
        spoiled = json.dumps(spoil_json(data, document)).encode()
        if end is not None:
            spoiled = len(spoiled).to_bytes(8, "little") + spoiled + content[end:]
        file.write_bytes(spoiled)

    return spoil
