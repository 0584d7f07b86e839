"""A run directory and a suite directory in which a file is not what was written: what resumes, exports and reports."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import steplm.training.run as run_module
from steplm.checkpoint import CheckpointState, load_checkpoint, verify_checkpoint
from steplm.checkpoint.folder import MARKER, complete_checkpoints, load_checkpoint_state, save_shards
from steplm.checkpoint.shards import BackgroundWriter
from steplm.config import RunConfig, load_config
from steplm.errors import CheckpointError
from steplm.report.page import write_page
from steplm.report.suite import SUITE_FILE, EntryRecord, Question, RunEntry, SuiteRecord, save_suite
from steplm.report.suite_figures import write_figures
from steplm.report.summary import read_suite
from steplm.report.tables import problems, write_tables
from steplm.rows import WHOLE, Rows
from steplm.training.display import make_display
from steplm.training.export import export
from steplm.training.run import train

fuzz = settings.get_profile("fuzz")
Claim = Callable[..., AbstractContextManager[None]]
Fresh = Callable[[], AbstractContextManager[Path]]
SpoilFile = Callable[[st.DataObject, Path], None]
SpoilJson = Callable[[st.DataObject, Any], Any]

DOCUMENTS = ("plan.json", "summary.json", "config.yaml", "metrics.jsonl", "environment.json", "evaluations.json")


@pytest.fixture(scope="module")
def finished(tiny_run: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two stages, all its checkpoints kept."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_run(run_dir, "train.save_steps=2", "train.save_total_limit=9", "plan.total_tokens=512"))
    scores = {
        "text": {"loss": 3.0, "perplexity": 20.1, "bits_per_byte": 1.2, "num_tokens": 99, "text": {"data": ["x"]}}
    }
    (run_dir / "evaluations.json").write_text(json.dumps(scores))
    _report(run_dir, tmp_path_factory.mktemp("report") / "report", with_figures=True)  # and imports all it needs
    return run_dir


@pytest.fixture(scope="module")
def checkpoint(finished: Path) -> Path:
    """One inside the second stage: it has adapters."""
    return next(path for path in complete_checkpoints(finished / "checkpoints") if path.name.startswith("stage2-step"))


@pytest.fixture(scope="module")
def sharded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as several ranks write it, here one alone."""
    whole = load_checkpoint(checkpoint)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        writer = BackgroundWriter(0, dist.group.WORLD)
        tensors = {"weights": whole.weights, "adapters": whole.adapters, "optimizer": whole.optimizer}
        root = tmp_path_factory.mktemp("sharded")
        path = save_shards(root, writer, config=whole.config, state=whole.state, then=lambda: None, **tensors)
        writer.wait()
    finally:
        dist.destroy_process_group()
    return path


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Path, sharded: Path) -> list[Path]:
    return [checkpoint, sharded]


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _mark(checkpoint: Path) -> None:
    """Make the marker say that the files are as they were written."""
    names = [name for name in _files(checkpoint) if name != MARKER]
    contents = {name: (checkpoint / name).read_bytes() for name in names}
    marker = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
    (checkpoint / MARKER).write_text(json.dumps(marker))


@fuzz
@given(data=st.data())
def test_a_spoiled_checkpoint_is_always_found(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, checkpoints: list[Path], spoil_file: SpoilFile
) -> None:
    checkpoint = data.draw(st.sampled_from(checkpoints), label="checkpoint")
    name = data.draw(st.sampled_from([name for name in _files(checkpoint) if name != MARKER]), label="file")
    with fresh_folder() as folder:
        copy = shutil.copytree(checkpoint, folder / checkpoint.name)
        spoil_file(data, copy / name)
        if (copy / name).read_bytes() == (checkpoint / name).read_bytes():
            return
        with claim(), pytest.raises(CheckpointError, match=Path(name).name):
            load_checkpoint(copy)
        with claim():
            load_checkpoint_state(copy)


@fuzz
@given(data=st.data())
def test_a_spoiled_marker_never_lets_an_unverified_checkpoint_through(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, checkpoints: list[Path], spoil_file: SpoilFile
) -> None:
    checkpoint = data.draw(st.sampled_from(checkpoints), label="checkpoint")
    with fresh_folder() as folder:
        copy = shutil.copytree(checkpoint, folder / checkpoint.name)
        spoil_file(data, copy / MARKER)
        with claim():
            complete_checkpoints(folder)
            verify_checkpoint(copy)
            marked = json.loads((copy / MARKER).read_text())
            assert set(_files(copy)) - {MARKER} <= set(marked), "a file that nothing vouches for"


@fuzz
@given(data=st.data())
def test_a_checkpoint_of_spoiled_values_is_loaded_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, checkpoints: list[Path], spoil_file: SpoilFile
) -> None:
    """The hashes are right: another program wrote it, or the memory failed before the disk did."""
    checkpoint = data.draw(st.sampled_from(checkpoints), label="checkpoint")
    name = data.draw(st.sampled_from([name for name in _files(checkpoint) if name != MARKER]), label="file")
    with fresh_folder() as folder:
        copy = shutil.copytree(checkpoint, folder / checkpoint.name)
        spoil_file(data, copy / name)
        _mark(copy)
        rows = data.draw(st.sampled_from([WHOLE, Rows(1, 3)]), label="rows")
        with claim():
            state = load_checkpoint(copy, rows=rows).state
            assert isinstance(state, CheckpointState)
            assert state.progress.stage_index > 0


@fuzz
@given(data=st.data())
def test_a_run_with_a_spoiled_file_resumes_or_is_refused(
    data: st.DataObject,
    claim: Claim,
    fresh_folder: Fresh,
    finished: Path,
    spoil_file: SpoilFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to the first stage, which is not trained; with wrong files and right hashes too."""

    def stop(run: Any) -> None:
        run.stop_signal = 15

    monkeypatch.setattr(run_module, "_run_phases", stop)
    files = [file for file in _files(finished) if not file.startswith(("export/", "tokenizer/", "."))]
    file = data.draw(st.sampled_from(files), label="file")
    is_over = data.draw(st.booleans(), label="finished")
    with fresh_folder() as folder:
        run_dir = shutil.copytree(finished, folder / "run", ignore=shutil.ignore_patterns("export"))
        config = load_config(run_dir / "config.yaml", [f"output_dir={run_dir}"])
        if not is_over:
            (run_dir / "summary.json").unlink()
        if (run_dir / file).is_file():
            spoil_file(data, run_dir / file)
            if file.startswith("checkpoints/") and not file.endswith(MARKER) and data.draw(st.booleans(), label="mark"):
                _mark(run_dir / Path(*Path(file).parts[:2]))
        with claim(run_dir):
            train(config, display=make_display("none"))


@fuzz
@given(data=st.data())
def test_a_run_with_a_spoiled_file_is_exported_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, finished: Path, spoil_file: SpoilFile
) -> None:
    newest = complete_checkpoints(finished / "checkpoints")[-1]
    names = [*DOCUMENTS, *(f"checkpoints/{newest.name}/{name}" for name in _files(newest))]
    names += [f"tokenizer/{name}" for name in _files(finished / "tokenizer")]
    file = data.draw(st.sampled_from(names), label="file")
    with fresh_folder() as folder:
        run_dir = shutil.copytree(finished, folder / "run", ignore=shutil.ignore_patterns("export", "stage1*"))
        spoil_file(data, run_dir / file)
        if file.startswith("checkpoints/") and not file.endswith(MARKER):
            _mark(run_dir / "checkpoints" / newest.name)
        with claim(run_dir, folder / "out", folder / ".out.writing"):
            export(run_dir, folder / "out")


def _report(directory: Path, output: Path, with_figures: bool) -> None:
    suite = read_suite(directory)
    problems(suite)
    output.mkdir()
    write_tables(suite, output)
    figures = write_figures(suite, output / "figures") if with_figures else {}
    write_page(suite, output / "index.html", figures)


@fuzz
@given(data=st.data())
def test_a_run_with_a_spoiled_document_is_reported_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, finished: Path, spoil_file: SpoilFile, spoil_json: SpoilJson
) -> None:
    name = data.draw(st.sampled_from(DOCUMENTS), label="document")
    with fresh_folder() as folder:
        run_dir = folder / "run"
        run_dir.mkdir()
        for document in DOCUMENTS:
            shutil.copy(finished / document, run_dir)
        if data.draw(st.booleans(), label="of steplm 0.1"):
            stages = [{"num_new_layers": 2}, {"num_new_layers": 0}, {"num_new_layers": 2}]
            (run_dir / "plan.json").write_text(json.dumps({"schema_version": 2, "stages": stages}))
        if name == "metrics.jsonl" and data.draw(st.booleans(), label="one event"):
            lines = (run_dir / name).read_text().splitlines()
            place = data.draw(st.integers(0, len(lines) - 1), label="line")
            lines[place] = json.dumps(spoil_json(data, json.loads(lines[place])))
            (run_dir / name).write_text("\n".join(lines) + "\n")
        else:
            spoil_file(data, run_dir / name)
        with_figures = data.draw(st.integers(0, 9), label="figures") == 0
        with claim(run_dir, folder / "report"):
            _report(run_dir, folder / "report", with_figures)


@fuzz
@given(data=st.data())
def test_a_suite_with_a_spoiled_document_is_reported_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, finished: Path, spoil_file: SpoilFile
) -> None:
    with fresh_folder() as folder:
        directory = folder / "suite"
        for seed in (0, 1):
            (directory / f"runs/step/lr0.01-seed{seed}").mkdir(parents=True)
            for document in DOCUMENTS:
                shutil.copy(finished / document, directory / f"runs/step/lr0.01-seed{seed}")
        entry = EntryRecord("step", "STEP", "step", settings={"a": 1}, tuned=True, learning_rate=0.01)
        runs = tuple(RunEntry("step", seed, 0.01, f"runs/step/lr0.01-seed{seed}", "finished") for seed in (0, 1))
        question = Question("Which?", ("step",), "step", "One.")
        save_suite(SuiteRecord("small", "tokens", (0, 1), (entry,), runs, (question,), (0.01,), 0, "step"), directory)
        name = data.draw(st.sampled_from([SUITE_FILE, *(f"{runs[0].dir}/{document}" for document in DOCUMENTS)]))
        spoil_file(data, directory / name)
        with claim(directory, folder / "report"):
            _report(directory, folder / "report", with_figures=False)
