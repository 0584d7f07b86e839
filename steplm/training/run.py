"""A run from configuration to exported model: prepare, plan, train, export. All methods share one loop."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from transformers import PreTrainedModel

from steplm.checkpoint import Checkpoint, CheckpointState, load_checkpoint
from steplm.checkpoint.folder import explained, is_disk_full, load_checkpoint_state
from steplm.checkpoint.shards import Background, BackgroundWriter, TensorFiles
from steplm.config import RunConfig, dump_config, load_config
from steplm.data.loader import Prefetcher, training_loader
from steplm.data.mixture import epochs, repetition_warnings
from steplm.data.prepare import prepare, with_prepared_dir
from steplm.data.tokens import MANIFEST, Manifest, TokenDataset
from steplm.distributed.world import World, joined, with_world_size
from steplm.errors import CheckpointError, ConfigError, SteplmError
from steplm.files import replacing, write_atomically
from steplm.models.build import DTYPES
from steplm.models.device import free_memory, resolve_device
from steplm.models.folder import load_config_and_state, load_hf_config
from steplm.models.shape import shape_of
from steplm.planner.plan import Plan, check_host_budget, price_again
from steplm.planner.plan import plan as make_plan
from steplm.schedule import Phase, Schedule
from steplm.training.assemble import Assembled, PhaseStart, assemble, probe_model
from steplm.training.checks import check_checkpoint, check_family, check_init_from, check_same_run
from steplm.training.context import RunContext
from steplm.training.display import Display, make_display
from steplm.training.enter import check_entrance, enter, go_on
from steplm.training.environment import environment, free_host_bytes
from steplm.training.evaluate import probe_loss, validation_loss
from steplm.training.export import export
from steplm.training.extend import begin_with, has_begun
from steplm.training.folder import RunFolder, require_this_version
from steplm.training.loop import memory_errors, train_phase
from steplm.training.metrics import SINKS, MetricsLog, NoLog, Sink, require_sinks
from steplm.training.save import in_memory
from steplm.training.signals import describe_stop, stopping_on_signals
from steplm.types import TrainState, to_json
from steplm.units import perplexity_of, reason


@dataclass(frozen=True)
class RunResult:
    """The result of a run; ``finished`` is false if a signal stopped it."""

    run_dir: Path
    plan: Plan
    finished: bool
    stop_signal: int | None = None
    validation_loss: float | None = None  # nats per token, of the exported model
    export_dir: Path | None = None

    @property
    def perplexity(self) -> float | None:
        return None if self.validation_loss is None else perplexity_of(self.validation_loss)


def train(config: RunConfig, *, display: Display | None = None, begin: Path | None = None) -> RunResult:
    """Run every stage of the plan and export the merged model; resume where an earlier call stopped.

    Writes ``config.yaml``, ``plan.json``, ``environment.json``, ``metrics.jsonl``, ``checkpoints/``,
    ``export/`` and ``summary.json`` into the run directory. Returns immediately if the run is finished.

    Args:
        begin: checkpoint of a shorter run to start from, if this run has not started; see ``steplm.training.extend``.

    Raises:
        ConfigError, DataError, PlanInfeasible: raised before any training.
        CheckpointMismatch: the run directory belongs to another run.
        MemoryMismatch: the measured model-state bytes differ from the plan.
        TrainingDiverged: the loss became NaN or infinite.
    """
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    config = _on_these_devices(config)
    with _disk_errors(config.run_dir), joined(config.distributed, resolve_device(config.train.device)) as world:
        if not world.is_first:
            return _train(config, world, make_display("none"))
        with _exclusive(config.run_dir):
            if begin is not None and not has_begun(config):
                begin_with(begin, config)
            return _train(config, world, display or make_display(config.log.progress))


def _train(config: RunConfig, world: World, display: Display) -> RunResult:
    with world.first_goes_ahead():
        run = _set_up(config, world, display)
    if run is None:
        return _result_of(config.run_dir)
    try:
        with stopping_on_signals(run), display:
            _run_phases(run)
            if run.stop_signal:
                display.note(describe_stop(run.stop_signal))
                return RunResult(config.run_dir, run.plan, finished=False, stop_signal=run.stop_signal)
            return _finish(run)
    finally:
        run.writer.join(config.distributed.timeout * 60)  # before its process group is destroyed
        run.batches.close()
        run.metrics.close()


def _set_up(config: RunConfig, world: World, display: Display) -> RunContext | None:
    """Build the run context with the checkpoint to resume from; None if finished. Rank 0 does all writes and checks."""
    folder, first = RunFolder.open(config.run_dir), world.is_first
    config = _with_prepared_dir(config, folder)
    shape = shape_of(config.model.hf_config())
    require_this_version(folder)
    # Do everything that can fail early before preparing the data, which can take hours.
    require_sinks(config.log.report_to)
    changed = check_same_run(config, folder) if first else []
    resumes = bool(folder.checkpoints) and folder.has_plan
    plan = price_again(config, shape, folder.plan) if resumes else make_plan(config, shape)
    check_family(config, plan)
    check_init_from(config, plan)
    if folder.finished:
        display.note(f"{folder.path} is finished already")
        return None
    if plan.host_bytes and (free_bytes := free_host_bytes()) is not None:
        check_host_budget(plan, free_bytes, "the machine's free memory", config)
    if first:
        _write_documents(config, plan, world)
    display.plan(plan)
    folder = folder.without_damage(display.note) if first else RunFolder.open(config.run_dir)
    checkpoint = folder.last_checkpoint
    # A resumed run needs its shards, which the checkpoint identifies by hash, but no longer the source text.
    prepares = first and checkpoint is None
    manifest = prepare(config, display.prepare) if prepares else Manifest.load(config.prepared_dir)
    state = None if checkpoint is None else load_checkpoint_state(checkpoint)
    if checkpoint is not None and state is not None:
        check_checkpoint(checkpoint, state, plan, manifest)
        display.resumed(checkpoint, state.progress)
    elif first and config.data.weights:
        for warning in repetition_warnings(epochs(manifest, config.data.weights, plan.total_tokens)):
            display.note(warning)
    loader = training_loader(config)
    run = RunContext(
        config=config,
        plan=plan,
        manifest=manifest,
        loader=loader,
        batches=Prefetcher(
            loader, config.global_batch_size, world.rank, world.size, pin_memory=world.device.type == "cuda"
        ),
        validation={
            name: TokenDataset(config.prepared_dir, split) for name, split in manifest.splits_of("validation").items()
        },
        metrics=_open_metrics(config, state) if first else NoLog(),
        display=display,
        world=world,
        writer=Background() if world.is_alone else BackgroundWriter(world.rank, world.checkpoint_group),
        seconds_before=0.0 if state is None else state.elapsed_seconds,
        last_checkpoint=checkpoint,
    )
    if changed and state is not None:
        display.note(f"resumed with {', '.join(changed)} changed")
        run.metrics.write("changed", tokens_seen=state.progress.tokens_seen, keys=changed)
    if first:
        _keep_tokenizer(config)
        if state is None and (counts := manifest.training_documents_by_length):
            run.metrics.write("data", tokens_seen=0, documents_by_length=counts)
    return run


def _on_these_devices(config: RunConfig) -> RunConfig:
    """Set the actual world size; keep the run's global batch size if the world size has ever changed.

    Raises:
        ConfigError: the config states another world size, or something is not divisible by it.
    """
    distributed = with_world_size(config.distributed)
    train, folder = config.train, RunFolder.open(config.run_dir)
    if folder.checkpoints and (before := folder.written) is not None:
        kept = before.train.global_batch_size is not None  # by an earlier change of the world size
        if train.global_batch_size is None and (kept or before.distributed.world_size != distributed.world_size):
            sequences = {"global_batch_size": before.global_batch_size, "gradient_accumulation_steps": 1}
            train = train.model_copy(update=sequences)
    if (distributed, train) == (config.distributed, config.train):
        return config
    values = config.model_dump(mode="json")
    parts = {"distributed": distributed.model_dump(mode="json"), "train": train.model_dump(mode="json")}
    return load_config(values | parts)


def _run_phases(run: RunContext) -> None:
    """Run the remaining phases, each from a checkpoint or from the in-memory state of the previous phase."""
    before = _loaded(run)
    phases = remaining_phases(run.plan.schedule, None if before is None else before.state.progress)
    start: PhaseStart | None = None
    assembled: Assembled | None = None
    for index, phase in enumerate(phases):
        with memory_errors(run, phase):
            if start is not None and assembled is not None:  # the previous phase's model is still in memory
                go_on(run, phase, start, assembled)
            else:
                start = enter(run, phase, before)
                before = None
                assembled = assemble(run.config, run.plan.shape, phase, start, run.world)
                start.forget_tensors()  # the model now owns what it needs
                check_entrance(run, phase, start, assembled)
                start.log.logged_at = time.monotonic()
            train_phase(run, phase, start, assembled)
        if run.stop_signal:
            break
        following = phases[index + 1] if index + 1 < len(phases) else None
        if following is not None and following.entry.kind == "go_on":
            continue
        if following is not None and not start.progress.stage_done:
            before = in_memory(run, phase, start, assembled)
        # Free the model before the next one is built: during growth the device may hold plain weights only. Compiled
        # layers form reference cycles, which only the garbage collector frees.
        start = assembled = None
        free_memory()
        if following is not None and before is None:
            _wait_for_writer(run)
            before = _loaded(run)
    _wait_for_writer(run)


def _loaded(run: RunContext) -> Checkpoint | None:
    """Load the last checkpoint, which was verified when it was chosen."""
    if run.last_checkpoint is None:
        return None
    with run.world.patiently():  # a network disk can be slow
        return load_checkpoint(run.last_checkpoint, rows=run.world.rows, verify=False)


def _wait_for_writer(run: RunContext) -> None:
    with run.world.patiently():
        run.writer.wait()


def remaining_phases(schedule: Schedule, progress: TrainState | None) -> tuple[Phase, ...]:
    """The phases that are not done; the first may be partly done."""
    if progress is None:
        return schedule.phases
    return schedule.phases[progress.phase_index - (0 if progress.phase_done else 1) :]


def _finish(run: RunContext) -> RunResult:
    """Export the model, evaluate it, and write the summary."""
    run_dir = run.config.run_dir
    export_dir = run_dir / "export"
    with run.world.first_goes_ahead():
        if run.world.is_first:
            export(run_dir)
    model = _exported_model(run, export_dir)
    tokens_seen = run.plan.total_tokens
    assert run.last_checkpoint is not None
    run.metrics.write(
        "merge",
        stage=run.plan.num_stages,
        tokens_seen=tokens_seen,
        loss_before=load_checkpoint_state(run.last_checkpoint).probe_loss,
        loss_after=probe_loss(run, model),
    )
    loss = validation_loss(run, model)
    run.metrics.write("run_end", tokens_seen=tokens_seen, elapsed_seconds=run.elapsed_seconds, validation_loss=loss)
    summary = {
        "schedule_hash": run.plan.schedule.hash,
        "tokens_seen": tokens_seen,
        "elapsed_seconds": run.elapsed_seconds,
        "mfu": run.mfu(run.plan.training_flops / run.elapsed_seconds),  # the time includes evaluation and saves
        "validation_loss": loss,
        "validation_perplexity": perplexity_of(loss),
        "export_dir": export_dir.name,
        "data_fingerprint": run.manifest.fingerprint,
    }
    with run.world.first_goes_ahead():
        if run.world.is_first:
            write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    run.display.finished(run_dir, export_dir, loss)
    return _result_of(run_dir)


def _exported_model(run: RunContext, export_dir: Path) -> PreTrainedModel:
    """Load the exported model for evaluation; with several ranks, each reads only its rows."""
    if run.world.rows.is_whole:
        exported_config, weights = load_config_and_state(export_dir, dtype=DTYPES[run.config.train.precision])
    else:
        exported_config, files = load_hf_config(export_dir), TensorFiles(export_dir)
        weights = files.read_all(files.shapes, run.world.rows)
    exported_config.use_cache = False
    return probe_model(run.config, exported_config, weights, run.world)


def _result_of(run_dir: Path) -> RunResult:
    file = run_dir / "summary.json"
    try:
        summary = json.loads(file.read_text())
        loss, export_dir = float(summary["validation_loss"]), Path(summary["export_dir"]).name
    except Exception as error:  # the file can contain anything
        raise CheckpointError(
            f"{file} cannot be used: {reason(error)}. Remove it, and run the same command again to write it.",
            path=str(file),
        ) from None
    plan = RunFolder.open(run_dir).plan
    return RunResult(run_dir, plan, finished=True, validation_loss=loss, export_dir=run_dir / export_dir)


def _with_prepared_dir(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Set the prepared-data folder: as configured, as used before by this run, or derived from the inputs."""
    if config.data.prepared_dir is None and folder.checkpoints and folder.written is not None:
        before = folder.written.data.prepared_dir
        if before is not None and (Path(before) / MANIFEST).is_file():
            return config.model_copy(update={"data": config.data.model_copy(update={"prepared_dir": before})})
    return with_prepared_dir(config)


def _open_metrics(config: RunConfig, state: CheckpointState | None) -> MetricsLog:
    tokens_seen = 0 if state is None else state.progress.tokens_seen
    sinks: list[Sink] = [SINKS[name](config.run_dir, config, tokens_seen) for name in config.log.report_to]
    keep_bytes = 0 if state is None else state.metrics_bytes
    return MetricsLog(config.run_dir / "metrics.jsonl", sinks, keep_bytes=keep_bytes)


def _keep_tokenizer(config: RunConfig) -> None:
    """Copy the tokenizer into the run directory, so that a run moved elsewhere can still be exported."""
    target = config.run_dir / "tokenizer"
    if not target.is_dir():
        with replacing(target) as unfinished:
            shutil.copytree(config.prepared_dir / "tokenizer", unfinished)


def _write_documents(config: RunConfig, plan: Plan, world: World) -> None:
    run_dir = config.run_dir
    write_atomically(run_dir / "config.yaml", dump_config(config))
    write_atomically(run_dir / "plan.json", json.dumps(to_json(plan), indent=1) + "\n")
    write_atomically(run_dir / "environment.json", json.dumps(environment(world.device), indent=1) + "\n")


@contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """Allow one process per run directory, however it ends; a run that is refused leaves no empty directory behind."""
    is_new = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock: IO[str] = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot write into the run directory {run_dir}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process trains in {run_dir}. Wait for it, stop it, or use another output_dir."
            ) from None
        try:
            yield
        except SteplmError:
            if is_new and [path.name for path in run_dir.iterdir()] == [".lock"]:
                (run_dir / ".lock").unlink()
                run_dir.rmdir()
            raise


@contextmanager
def _disk_errors(run_dir: Path) -> Iterator[None]:
    """Explain disk-full errors wherever they occur: in the log, the export, or the tokenizer copy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SteplmError) or not is_disk_full(error):
            raise
        raise explained(error, run_dir) from None
