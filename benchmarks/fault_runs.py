"""A tiny run as its user sees it: a command that is started, watched, killed and restarted, and the files it leaves.

A run is observed only through its exit codes, output and files. A run with one process is forked from this process,
which has already imported everything; one with several is started by ``torch.distributed.run``. Linux only, because it
reads ``/proc``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import steplm.training.run  # imported here so that children need not import it
from steplm.checkpoint.folder import MARKER, complete_checkpoints
from steplm.checkpoint.hashed import HashedFile
from steplm.cli.app import main as steplm_main
from steplm.data.loader import Batch, Prefetcher
from steplm.training import loop as loop_module
from steplm.training import step as step_module
from steplm.training.metrics import read_metrics

# A fork keeps only the calling thread, so the threads of a pool would be missing in the child.
torch.set_num_threads(1)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TIMEOUT_SECONDS = 180  # a run takes one or two seconds, or ten under torchrun; anything this long hangs
TOLERANCE = 1e-5  # for several processes, where the order of summation may differ

WORDS = ("the", "model", "grows", "new", "layers", "between", "old", "ones", "while", "memory", "stays", "small")
STEP_TOKENS, NUM_STEPS = 64, 14
CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 300,
        "max_position_embeddings": 16,
    },
    "data": {"validation_fraction": 0.1, "shard_tokens": 4000, "num_workers": 1},
    "plan": {"num_stages": 2, "layers": [3, 1], "total_tokens": NUM_STEPS * STEP_TOKENS},
    "pet": {"rank": 2},
    "optim": {"learning_rate": 1e-2},
    # The number of sequences per step is the same at any world size. Saves every 2nd step and logs every 3rd.
    "train": {
        "precision": "fp32",
        "device": "cpu",
        "sequence_length": 16,
        "per_device_train_batch_size": 2,
        "global_batch_size": 4,
        "loss_chunk_size": 32,
        "save_steps": 2,
    },
    "eval": {"eval_steps": 4, "max_tokens": 256, "per_device_eval_batch_size": 32},
    "log": {"progress": "lines", "logging_steps": 3},
}


class Wrong(Exception):
    """A run did not behave as required."""


def require(fact: bool, message: str) -> None:
    if not fact:
        raise Wrong(message)


# Attempts: one process, or torchrun and its ranks.


class Attempt:
    """One execution of the command, which is started, watched and possibly killed."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        world_size: int,
        *,
        obey_permissions: bool = False,
        change: Callable[[], None] = lambda: None,
    ) -> None:
        self.log, self.world_size = log, world_size
        self.exit_code: int | None = None
        self.deadline = time.monotonic() + TIMEOUT_SECONDS
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            change()
            _be_the_command(arguments, log, world_size, obey_permissions)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal that ended the process; None while it runs."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def wait(self) -> int:
        """Wait until every process has ended, and return the exit code."""
        while self.poll() is None or self.ranks():
            if time.monotonic() > self.deadline:
                self.kill_all()
                raise Wrong(f"no end after {TIMEOUT_SECONDS} seconds")
            time.sleep(0.002)
        assert self.exit_code is not None
        return self.exit_code

    def ranks(self) -> list[int]:
        """The process ids other than the first process's, whoever their parent is by now."""
        if self.world_size == 1:
            return []
        mark = f"{MARK}={self.log}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return [pid for pid in found if pid != self.pid]

    def kill(self, generator: random.Random) -> None:
        """Send SIGKILL to the single process, to one rank, or to all processes."""
        ranks = self.ranks()
        if ranks and generator.random() < 0.5:
            with suppress(ProcessLookupError):
                os.kill(generator.choice(ranks), signal.SIGKILL)
        else:
            self.kill_all()

    def kill_all(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)  # first, so that it starts no more ranks
        while ranks := self.ranks():
            for pid in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


MARK = "STEPLM_FAULTS_ATTEMPT"  # set in the environment of torchrun and its ranks, to find them


def _be_the_command(arguments: list[str], log: Path, world_size: int, obey_permissions: bool) -> None:
    """Turn the forked child into ``steplm ...``; never returns."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
        os.environ["COLUMNS"] = "1000"  # so that paths are not wrapped
        gc.freeze()  # imported objects need no garbage collection
        if obey_permissions:
            _obey_permissions()
        if world_size > 1:
            os.environ[MARK] = str(log)
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), "-m", "steplm"]
            os.execv(sys.executable, [sys.executable, "-m", *launcher, *arguments])
        sys.argv = ["steplm", *arguments]
        steplm_main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def _spoil_steps(spoilt: frozenset[int]) -> None:
    """In a forked child, make the loss NaN in the steps that start after these numbers of tokens."""
    fetch, train_step, batch_loss = Prefetcher.batch, loop_module.train_step, step_module.batch_loss
    begins_at, is_step = 0, False

    def noting(batches: Prefetcher, tokens_seen: int) -> Batch:
        nonlocal begins_at
        begins_at = tokens_seen
        return fetch(batches, tokens_seen)

    def stepping(*arguments: Any, **keys: Any) -> Any:
        nonlocal is_step
        is_step = True
        try:
            return train_step(*arguments, **keys)
        finally:
            is_step = False

    def spoiling(*arguments: Any, **keys: Any) -> torch.Tensor:
        loss = batch_loss(*arguments, **keys)
        return loss * math.nan if is_step and begins_at in spoilt else loss

    Prefetcher.batch = noting  # type: ignore[method-assign]
    loop_module.train_step, step_module.batch_loss = stepping, spoiling


def _slow_the_disk(seconds: float) -> None:
    """In a forked child, delay every write of tensors by this many seconds."""
    write = HashedFile.write

    def slowly(file: HashedFile, data: Any) -> int:
        time.sleep(seconds)
        return write(file, data)

    HashedFile.write = slowly  # type: ignore[method-assign, assignment]


def _obey_permissions() -> None:
    """Drop the two capabilities that let root ignore file permissions."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, for programs executed later
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    for index in range(3):  # effective, permitted, inheritable
        data[index] &= ~0b110
    libc.capset(header, data)


# Run directories.


@dataclass
class Subject:
    """A run to break: its files, the faults injected into it, and the outcome."""

    root: Path
    text: Path
    world_size: int
    generator: random.Random
    seconds: float = 0.0  # duration of the unbroken run
    num_bytes: int = 0  # bytes written by the unbroken run
    max_faults: int = 3
    spoilt: frozenset[int] = frozenset()  # tokens seen before the steps whose loss is NaN, in every run
    faults: int = 0
    resumed: int = 0  # faults that left a checkpoint to resume from
    landed: Counter[str] = field(default_factory=Counter)
    attempts: list[Attempt] = field(default_factory=list)
    _before: dict[str, int] = field(default_factory=dict)  # last modification times before this attempt
    _unfinished_before: frozenset[tuple[str, int]] = frozenset()

    def __post_init__(self) -> None:
        self.disk.mkdir(parents=True)
        self.configure()

    @property
    def disk(self) -> Path:
        """The folder of everything that the run writes."""
        return self.root / "disk"

    @property
    def run_dir(self) -> Path:
        return self.disk / "run"

    @property
    def prepared_dir(self) -> Path:
        return self.disk / "prepared"

    @property
    def checkpoints(self) -> list[Path]:
        return complete_checkpoints(self.run_dir / "checkpoints")

    @property
    def is_finished(self) -> bool:
        return (self.run_dir / "summary.json").is_file()

    def configure(self, **changes: Any) -> None:
        """Write ``run.yaml``; ``changes`` maps ``section.key`` to values."""
        values: dict[str, Any] = {
            "name": "faults",
            "output_dir": str(self.run_dir),
            **{section: dict(keys) for section, keys in CONFIG.items()},
        }
        values["data"] |= {"train": str(self.text), "prepared_dir": str(self.prepared_dir)}
        for name, value in changes.items():
            section, _, key = name.rpartition(".")
            (values.setdefault(section, {}) if section else values)[key] = value
        (self.root / "run.yaml").write_text(yaml.safe_dump(values))

    def start(self, verb: str = "train", *, disk_seconds: float = 0.0, **options: Any) -> Attempt:
        """Start the command; ``disk_seconds`` is the delay of each write of tensors."""

        def change() -> None:
            _spoil_steps(self.spoilt)
            if disk_seconds:
                _slow_the_disk(disk_seconds)

        self._before = {name: _changed_at(self.run_dir / name) for name in (".lock", "metrics.jsonl")}
        self._unfinished_before = frozenset(self._unfinished())
        world_size = self.world_size if verb == "train" else 1
        log = self.root / f"attempt-{len(self.attempts) + 1}.log"
        self.attempts.append(Attempt([verb, str(self.root / "run.yaml")], log, world_size, change=change, **options))
        return self.attempts[-1]

    def end(self) -> None:
        """Stop all processes and unmount the disk, but keep the files that the run wrote."""
        for attempt in self.attempts:
            attempt.kill_all()
            attempt.wait()
        if self.disk.is_mount():
            shutil.copytree(self.disk, self.root / "was_mounted")
            unmount(self.disk)

    # What can be observed of a run from outside, while it runs and after it has died.

    def _unfinished(self) -> Iterator[tuple[str, int]]:
        """Yield the checkpoints that are being written, each with its last modification time."""
        with suppress(OSError):
            for path in (self.run_dir / "checkpoints").iterdir():
                if not (path / MARKER).exists() and not path.name.endswith(".damaged"):
                    yield path.name, _changed_at(path)

    def last_event(self) -> str | None:
        """The last event in ``metrics.jsonl``, if the last attempt has written to it."""
        log = self.run_dir / "metrics.jsonl"
        if _changed_at(log) == self._before["metrics.jsonl"]:
            return None
        with log.open("rb") as stream:
            stream.seek(max(stream.seek(0, os.SEEK_END) - 4096, 0))
            found = re.findall(rb'\{"event":"(\w+)"', stream.read())
        return found[-1].decode() if found else None

    def _has_ended(self, stage: int) -> bool:
        checkpoints = self.checkpoints
        return bool(checkpoints) and checkpoints[-1].name == f"stage{stage}-end"

    def sight_of_preparing(self) -> object:
        if (self.prepared_dir / "manifest.json").is_file():
            return None
        return _num_files(self.prepared_dir) or None

    def sight_of_saving(self) -> object:
        names = {name for name, _ in set(self._unfinished()) - self._unfinished_before}
        return min(names, default=None)

    def sight_of_growing(self) -> object:
        """Observe the time from the checkpoint at the end of stage 1 to the first event of stage 2."""
        event = self.last_event()
        return event if event in ("stage_end", "merge", "growth") and self._has_ended(1) else None

    def sight_of_exporting(self) -> object:
        event = self.last_event()
        is_now = event in ("stage_end", "merge", "run_end") and self._has_ended(2)
        return (event, _num_files(self.run_dir / ".export.writing")) if is_now else None

    def sight_of_training(self) -> object:
        event = self.last_event()
        return (self.run_dir / "metrics.jsonl").stat().st_size if event in ("stage_start", "train", "eval") else None

    def where(self) -> str:
        """The moment at which the last attempt died."""
        return next((name for name, moment in MOMENTS.items() if moment.sight(self) is not None), "starting")

    def wait_for(self, attempt: Attempt, is_now: Callable[[], bool]) -> bool:
        """Wait until ``is_now()``; return False if the attempt ends first."""
        while not is_now():
            if attempt.poll() is not None:
                return False
            require(time.monotonic() < attempt.deadline, f"no end after {TIMEOUT_SECONDS} seconds")
            time.sleep(0.0005)
        return True

    def wait_until_begun(self, attempt: Attempt) -> bool:
        """Wait until the run directory is locked, so that imports do not count as part of the run."""
        return self.wait_for(attempt, lambda: _changed_at(self.run_dir / ".lock") != self._before[".lock"])

    def sleep(self, share: float) -> None:
        """Sleep for up to this share of the duration of the unbroken run."""
        time.sleep(self.generator.uniform(0, share) * self.seconds)

    # Injected faults, and whether the run recovers from them.

    def note_fault(self, where: str) -> None:
        self.faults += 1
        self.landed[where] += 1
        self.resumed += bool(self.checkpoints)

    def stop_after(self, num_checkpoints: int) -> bool:
        """Run slightly past ``num_checkpoints`` complete checkpoints, then kill; return False if the run ends first."""
        attempt = self.start()
        if self.wait_for(attempt, lambda: len(self.checkpoints) >= num_checkpoints):
            self.sleep(0.4)
            attempt.kill_all()
        return attempt.wait() != 0 and not self.is_finished

    def refused(self, attempt: Attempt, *words: str, exit_code: int = 1) -> None:
        """Require that the attempt ends with this exit code and a message that contains these words."""
        code = attempt.wait()
        require(code != 0, f"it was accepted: {' '.join(words)}\n{attempt.output}")
        for word in words:
            require(word.lower() in attempt.output.lower(), f"the message does not say {word!r}:\n{attempt.output}")
        self.check_speech(attempt)
        if self.world_size > 1:  # torchrun itself exits with 1; its summary ends with the code of the first failed rank
            code = int(re.findall(r"^  exitcode  : (-?\d+)", attempt.output, re.MULTILINE)[-1])
        require(code == exit_code, f"exit code {code}, not {exit_code}:\n{attempt.output}")

    def check_speech(self, attempt: Attempt) -> None:
        # torchrun prints its own tracebacks, which contain no line of this package.
        sign = "Traceback" if self.world_size == 1 else f"{Path(steplm.__file__).parent}{os.sep}"
        require(sign not in attempt.output, f"a traceback:\n{attempt.output}")

    def finish(self) -> Attempt:
        """Start the same command again, and require that it resumes from the last checkpoint and finishes."""
        checkpoints = self.checkpoints
        attempt = self.start()
        code = attempt.wait()
        require(code == 0, f"started again it ended with exit code {code}:\n{attempt.output}")
        require(self.is_finished, f"exit code 0 without an end:\n{attempt.output}")
        self.check_speech(attempt)
        self.check_goes_on(attempt, checkpoints)
        return attempt

    def check_goes_on(self, attempt: Attempt, checkpoints: list[Path]) -> None:
        """Require that the first logged step comes after the last checkpoint that was not found damaged."""
        good = [path for path in checkpoints if f"passing over {path.name}" not in attempt.output]
        first = STEP.search(attempt.output)
        if good and first:
            goes_on = (int(first[1]), int(first[2])) > progress_of(good[-1])
            require(goes_on, f"it began again before {good[-1].name}:\n{attempt.output}")

    def difference(self, other: Subject) -> str | None:
        """Describe the first difference between two finished runs; None if they are equal."""
        histories = self._history(), other._history()
        if len(histories[0]) != len(histories[1]):
            return f"{len(histories[0])} events in the log, not {len(histories[1])}"
        for number, (event, expected) in enumerate(zip(*histories, strict=True), 1):
            if not _equal(event, expected, exact=self.world_size == 1):
                return f"line {number} of the log is {event}, not {expected}"
        losses = [json.loads((run.run_dir / "summary.json").read_text())["validation_loss"] for run in (self, other)]
        if not _equal(*losses, exact=self.world_size == 1):
            return f"validation loss {losses[0]}, not {losses[1]}"
        ours, theirs = (_weights(run.run_dir / "export") for run in (self, other))
        return "other exported weights" if self.world_size == 1 and ours != theirs else None

    def _history(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in event.items() if not OF_THE_PROCESS.search(key)}
            for event in read_metrics(self.run_dir / "metrics.jsonl")
        ]


STEP = re.compile(r"^stage (\d)/\d  step (\d+)", re.MULTILINE)  # in the output

# Times, speeds and memory depend on the history of the process, so they are not compared.
OF_THE_PROCESS = re.compile(r"_seconds$|_per_second$|_(allocated|reserved|resident)_bytes$")


def _changed_at(path: Path) -> int:
    """The modification time in nanoseconds; 0 if the path does not exist."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _num_files(folder: Path) -> int:
    # rglob would fail if a folder is renamed during the walk.
    return sum(len(files) for _, _, files in os.walk(folder))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def progress_of(checkpoint: Path) -> tuple[int, float]:
    """The stage and step in a checkpoint's name; the end of a stage comes after all its steps."""
    stage, _, step = checkpoint.name.removeprefix("stage").partition("-")
    return int(stage), math.inf if step == "end" else int(step.removeprefix("step"))


def _weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def _equal(one: Any, other: Any, *, exact: bool) -> bool:
    if exact or not isinstance(one, dict | float):
        return one == other
    if isinstance(one, float):
        return isinstance(other, float) and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return one.keys() == other.keys() and all(_equal(one[key], other[key], exact=False) for key in one)


@dataclass(frozen=True)
class Moment:
    """A part of a run at which faults can be aimed."""

    sight: Callable[[Subject], object]  # an observed value that changes as this part advances; None outside of it
    num_sights: int  # the largest number of different values to wait for
    share: float  # of the run's duration, from one value to the next


MOMENTS = {
    "preparing": Moment(Subject.sight_of_preparing, 8, 0.01),
    "saving": Moment(Subject.sight_of_saving, 5, 0.01),
    "growing": Moment(Subject.sight_of_growing, 3, 0.05),
    "exporting": Moment(Subject.sight_of_exporting, 5, 0.05),
    "training": Moment(Subject.sight_of_training, 6, 0.05),
}


def mount(folder: Path, num_bytes: int, *options: str) -> None:
    """Mount an in-memory file system of this size."""
    size = f"size={max(num_bytes, 4096)}"
    command = ["mount", "-t", "tmpfs", "-o", ",".join([size, *options]), "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(Path(folder), 4096)
        except (OSError, subprocess.CalledProcessError):
            return False
        unmount(Path(folder))
        return True


def write_text(path: Path) -> None:
    generator = random.Random(0)
    documents = (
        f"{number}: " + " ".join(generator.choices(WORDS, k=generator.randint(10, 60))) for number in range(300)
    )
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
