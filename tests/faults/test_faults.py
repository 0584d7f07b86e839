"""Runs that are broken in every way we know, and started again, end as the unbroken one.

These are small doses of ``benchmarks/faults.py``.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import faults
from fault_runs import Subject, Wrong, can_mount
from faults import Workshop

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
needs_mount = pytest.mark.skipif(not can_mount(), reason="a small file system cannot be mounted here")


def _params(kinds: Iterable[str]) -> list:
    return [pytest.param(kind, marks=needs_mount if kind == "full disk" else ()) for kind in kinds]


KINDS = _params(faults.KINDS)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("faults"), world_size=1, seed=0)


@pytest.fixture
def copy(workshop: Workshop, request: pytest.FixtureRequest) -> Subject:
    """Of the unbroken run, to be changed."""
    subject = workshop.subject(request.node.name, 0)
    shutil.copytree(workshop.unbroken.disk, subject.disk, dirs_exist_ok=True)
    return subject


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_run_ends_as_the_unbroken_one(workshop: Workshop, kind: str) -> None:
    outcome = workshop.break_runs(kind, 2 if kind == "kill" else 1)
    assert outcome.problems == []
    assert outcome.tries > 0, "no fault met a run"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_many_broken_runs_end_as_the_unbroken_one(workshop: Workshop, kind: str) -> None:
    outcome = workshop.break_runs(kind, 10, first=100)
    assert outcome.problems == []
    assert outcome.tries >= 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", _params(["kill", "terminate", "full disk", "flip", "change refused", "twice"]))
def test_a_broken_run_of_two_processes_ends_as_the_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    outcome = Workshop(tmp_path_factory.mktemp("faults"), world_size=2, seed=0).break_runs(kind, 2)
    assert outcome.problems == []
    assert outcome.tries >= 2


def test_equal_runs_are_equal(workshop: Workshop, copy: Subject) -> None:
    assert copy.difference(workshop.unbroken) is None


def test_one_bit_of_the_weights_is_a_difference(workshop: Workshop, copy: Subject) -> None:
    file = copy.run_dir / "export" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert copy.difference(workshop.unbroken) == "other exported weights"


@pytest.mark.parametrize("number", ["loss", "grad_norm", "planned_peak_bytes", "step"])
def test_one_digit_of_the_log_is_a_difference(workshop: Workshop, copy: Subject, number: str) -> None:
    log = copy.run_dir / "metrics.jsonl"
    text = log.read_text()
    place = [match.end() for match in re.finditer(rf'"{number}":(?=\d)', text)][-1]  # a skipped step's norm is null
    log.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    difference = copy.difference(workshop.unbroken)
    assert difference is not None
    assert f"'{number}'" in difference


def test_an_event_that_is_logged_twice_is_a_difference(workshop: Workshop, copy: Subject) -> None:
    log = copy.run_dir / "metrics.jsonl"
    log.write_text(log.read_text() + log.read_text().splitlines(keepends=True)[-1])
    assert "events in the log" in str(copy.difference(workshop.unbroken))


def test_a_run_that_begins_again_is_wrong_though_it_ends_equal(workshop: Workshop) -> None:
    # A run may be quicker than the kill.
    subjects = (workshop.subject("begins again", number, workshop.unbroken) for number in range(10))
    subject = next(subject for subject in subjects if subject.stop_after(2))
    kept = subject.checkpoints
    for checkpoint in kept:
        checkpoint.rename(checkpoint.with_name(f"hidden-{checkpoint.name}"))
    attempt = subject.start()
    attempt.wait()
    assert subject.difference(workshop.unbroken) is None
    with pytest.raises(Wrong, match="began again before"):
        subject.check_goes_on(attempt, kept)


def test_half_of_the_kills_come_at_any_instant_and_each_moment_gets_its_part() -> None:
    shares = faults.shares(faults.KINDS, 200)
    assert shares == {"kill": 100, **{kind: 20 for kind in faults.KILLS if kind != "kill"}}
    assert faults.shares(["kill saving", "flip"], 7) == {"kill saving": 7}
    assert faults.shares(["kill"], 7) == {"kill": 7}
    assert not faults.shares(["flip"], 7)
