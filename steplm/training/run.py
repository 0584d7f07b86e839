"""A run, from configuration to exported model: prepare, plan, stages, export. One loop for every method."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from transformers import PreTrainedModel

from steplm.checkpoint import CheckpointState, latest_checkpoint, prune_checkpoints, verify_checkpoint
from steplm.checkpoint.folder import complete_checkpoints, explained, is_disk_full, load_checkpoint_state, mark_damaged
from steplm.checkpoint.shards import BackgroundWriter, TensorFiles
from steplm.config import RunConfig, dump_config, load_config
from steplm.data.loader import Batch, BatchLoader, validation_windows
from steplm.data.prepare import prepare, with_prepared_dir
from steplm.data.tokens import MANIFEST, Manifest, TokenDataset
from steplm.distributed.world import World, joined, with_world_size
from steplm.errors import CheckpointError, ConfigError, SteplmError
from steplm.files import write_atomically
from steplm.models.build import DTYPES, hf_config
from steplm.models.device import free_memory, resolve_device
from steplm.models.folder import load_config_and_state, load_hf_config
from steplm.models.forward import summed_loss
from steplm.models.shape import shape_of
from steplm.planner.plan import plan as make_plan
from steplm.training.assemble import assemble, probe_model
from steplm.training.checks import check_checkpoint, check_init_from, check_same_run, written_plan
from steplm.training.display import Display, make_display
from steplm.training.environment import environment
from steplm.training.export import export
from steplm.training.metrics import SINKS, MetricsLog, NoLog, Sink, require_sinks
from steplm.training.signals import stopping_on_signals
from steplm.training.stage import (
    check_entrance,
    enter_stage,
    memory_errors,
    probe_loss,
    require_finite,
    train_stage,
)
from steplm.training.step import StepReport
from steplm.types import Plan, Stage, TrainState, to_json
from steplm.units import perplexity_of, reason


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. ``finished`` is false where a signal stopped it."""

    run_dir: Path
    plan: Plan
    finished: bool
    stop_signal: int | None = None
    validation_loss: float | None = None  # nats a token, of the exported model
    export_dir: Path | None = None

    @property
    def perplexity(self) -> float | None:
        return None if self.validation_loss is None else perplexity_of(self.validation_loss)


@dataclass
class Run:
    """What every stage of a run shares."""

    config: RunConfig
    plan: Plan
    manifest: Manifest
    loader: BatchLoader
    validation: TokenDataset
    metrics: MetricsLog
    display: Display
    world: World
    writer: BackgroundWriter | None = None  # of checkpoints, where there are several ranks
    seconds_before: float = 0.0  # trained before this process
    started_at: float = field(default_factory=time.monotonic)
    requested_signal: int | None = None  # to this process
    stop_signal: int | None = None  # what all ranks stop at, at the same step

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def checkpoints_dir(self) -> Path:
        return self.config.run_dir / "checkpoints"

    @property
    def last_checkpoint(self) -> Path | None:
        return latest_checkpoint(self.checkpoints_dir)

    @property
    def elapsed_seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started_at

    def evaluate(self, stage: Stage, progress: TrainState, model: PreTrainedModel) -> float:
        """Validation loss, logged and shown."""
        loss = self.validation_loss(model)
        require_finite(self, stage, progress, loss)
        perplexity = perplexity_of(loss)
        self.metrics.write(
            "eval",
            stage=stage.index,
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            loss=loss,
            perplexity=perplexity,
        )
        self.display.evaluation(stage, progress, loss, perplexity)
        return loss

    def validation_loss(self, model: PreTrainedModel, max_tokens: int | None = None) -> float:
        """Mean over so many validation tokens, by default those of an evaluation; each rank computes its share."""
        batches = validation_windows(
            self.validation,
            self.config.train.sequence_length,
            max_tokens or self.config.eval.max_tokens,
            batch_size=self.config.eval_batch_size,
            within_documents=self.config.data.within_documents,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        chunk_size = self.config.train.loss_chunk_size
        total, count = self.world.sum(*summed_loss(model, self._showing_life(batches), chunk_size=chunk_size))
        return total / max(count, 1)

    def _showing_life(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.world.alive()
            yield batch

    def agree_to_stop(self) -> None:
        """A signal to one rank stops all of them at the same step; one that comes later waits for the next step."""
        requested = self.requested_signal  # read once: it can come at any time
        if self.world.any(requested):
            self.stop_signal = requested or signal.SIGTERM

    def prune_checkpoints(self) -> None:
        prune_checkpoints(self.checkpoints_dir, self.config.train.save_total_limit)

    def log_step(self, report: StepReport) -> None:
        self.metrics.write(
            "train",
            stage=report.stage.index,
            step=report.progress.step,
            num_steps=report.num_steps,
            tokens_seen=report.progress.tokens_seen,
            loss=report.result.loss,
            learning_rate=report.learning_rate,
            grad_norm=report.result.grad_norm,
            tokens_per_second=report.tokens_per_second,
            elapsed_seconds=self.elapsed_seconds,
            **to_json(report.peak),
        )
        self.display.step(report)


def train(config: RunConfig, *, display: Display | None = None) -> RunResult:
    """Run every stage of the plan and export the merged model; resume where an earlier call stopped.

    Writes ``config.yaml``, ``plan.json``, ``environment.json``, ``metrics.jsonl``, ``checkpoints/``,
    ``export/`` and ``summary.json`` into the run directory. A finished run returns at once.

    Raises:
        ConfigError, DataError, PlanInfeasible: before anything is trained.
        CheckpointMismatch: the run directory holds another run.
        MemoryMismatch: the measured model-state bytes are not the planned ones.
        TrainingDiverged: the loss became NaN or infinite.
    """
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    config = _on_these_devices(config)
    with _disk_errors(config.run_dir), joined(config.distributed, resolve_device(config.train.device)) as world:
        if not world.is_first:
            return _train(config, world, make_display("none"))
        with _exclusive(config.run_dir):
            return _train(config, world, display or make_display(config.log.progress))


def _train(config: RunConfig, world: World, display: Display) -> RunResult:
    with world.first_goes_ahead():
        run, checkpoint = _set_up(config, world, display)
    if run is None:
        return _result_of(config.run_dir)
    try:
        with stopping_on_signals(run), display:
            checkpoint = _run_stages(run, checkpoint)
            if run.stop_signal:
                display.note(f"stopped by signal {run.stop_signal}; run the same command again to resume")
                return RunResult(config.run_dir, run.plan, finished=False, stop_signal=run.stop_signal)
            return _finish(run)
    finally:
        if run.writer is not None:
            run.writer.join(config.distributed.timeout * 60)  # before its process group is gone
        run.metrics.close()


def _set_up(config: RunConfig, world: World, display: Display) -> tuple[Run | None, Path | None]:
    """The run, and the checkpoint that it goes on from; no run if it is finished. The first rank writes and checks."""
    run_dir, first = config.run_dir, world.is_first
    config = _with_prepared_dir(config)
    plan = make_plan(_with_layers_of_before(config), shape_of(config.model.hf_config()))
    # All that can fail at once, before the data, which can take hours.
    hf_config(config.model.hf_config())
    require_sinks(config.log.report_to)
    check_init_from(config, plan)
    changed = check_same_run(config, plan) if first else []
    if (run_dir / "summary.json").is_file():
        display.note(f"{run_dir} is finished already")
        return None, None
    checkpoints = run_dir / "checkpoints"
    if first:
        _write_documents(config, plan, world)
    display.plan(plan)
    checkpoint = _usable_checkpoint(checkpoints, display) if first else latest_checkpoint(checkpoints)
    # A resumed run needs its shards, which the checkpoint names by their hash, but not the text any more.
    prepares = first and checkpoint is None
    manifest = prepare(config, display.prepare) if prepares else Manifest.load(config.prepared_dir)
    state = None if checkpoint is None else load_checkpoint_state(checkpoint)
    if checkpoint is not None and state is not None:
        check_checkpoint(checkpoint, state, plan, manifest)
    run = Run(
        config=config,
        plan=plan,
        manifest=manifest,
        loader=BatchLoader(
            TokenDataset(config.prepared_dir, "train"),
            seed=config.seed,
            sequence_length=config.train.sequence_length,
            within_documents=config.data.within_documents,
        ),
        validation=TokenDataset(config.prepared_dir, "validation"),
        metrics=_open_metrics(config, state) if first else NoLog(),
        display=display,
        world=world,
        writer=None if world.is_alone else BackgroundWriter(world.rank, world.checkpoint_group),
        seconds_before=0.0 if state is None else state.elapsed_seconds,
    )
    if changed and state is not None:
        display.note(f"resumed with {', '.join(changed)} changed")
        run.metrics.write("changed", tokens_seen=state.progress.tokens_seen, keys=changed)
    if first:
        _keep_tokenizer(config)
    return run, checkpoint


def _on_these_devices(config: RunConfig) -> RunConfig:
    """With the number of processes that there are, and the batch of before, if there ever were more or fewer.

    Raises:
        ConfigError: another number is written, or it divides something unevenly.
    """
    distributed = with_world_size(config.distributed)
    train, written = config.train, config.run_dir / "config.yaml"
    if written.is_file() and complete_checkpoints(config.run_dir / "checkpoints"):
        before = load_config(written)
        kept = before.train.global_batch_size is not None  # by an earlier change of their number
        if train.global_batch_size is None and (kept or before.distributed.world_size != distributed.world_size):
            sequences = {"global_batch_size": before.global_batch_size, "gradient_accumulation_steps": 1}
            train = train.model_copy(update=sequences)
    if (distributed, train) == (config.distributed, config.train):
        return config
    values = config.model_dump(mode="json")
    parts = {"distributed": distributed.model_dump(mode="json"), "train": train.model_dump(mode="json")}
    return load_config(values | parts)


def _run_stages(run: Run, checkpoint: Path | None) -> Path | None:
    for stage in _remaining_stages(run.plan, checkpoint):
        with memory_errors(run, stage):
            start = enter_stage(run, stage, checkpoint)
            assembled = assemble(run.config, stage, start, run.world)
            start.forget_tensors()  # the model holds what it needs
            check_entrance(run, stage, start, assembled)
            checkpoint = train_stage(run, stage, start, assembled)
        # Gone before the next stage is built: at growth the device holds plain weights only. A compiled
        # layer is a reference cycle, which only the collector ends.
        del assembled, start
        free_memory()
        if run.stop_signal:
            break
    return checkpoint


def _remaining_stages(plan: Plan, checkpoint: Path | None) -> list[Stage]:
    if checkpoint is None:
        return list(plan.stages)
    progress = load_checkpoint_state(checkpoint).progress
    return list(plan.stages[progress.stage_index - (0 if progress.stage_done else 1) :])


def _finish(run: Run) -> RunResult:
    """Export, evaluate the exported model, write the summary."""
    run_dir = run.config.run_dir
    export_dir = run_dir / "export"
    with run.world.first_goes_ahead():
        if run.world.is_first:
            export(run_dir)
    model = _exported_model(run, export_dir)
    tokens_seen = run.plan.total_tokens
    last = latest_checkpoint(run.checkpoints_dir)
    assert last is not None
    run.metrics.write(
        "merge",
        stage=run.plan.num_stages,
        tokens_seen=tokens_seen,
        loss_before=load_checkpoint_state(last).probe_loss,
        loss_after=probe_loss(run, model),
    )
    loss = run.validation_loss(model)
    run.metrics.write("run_end", tokens_seen=tokens_seen, elapsed_seconds=run.elapsed_seconds, validation_loss=loss)
    summary = {
        "plan_hash": run.plan.hash,
        "tokens_seen": tokens_seen,
        "elapsed_seconds": run.elapsed_seconds,
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


def _exported_model(run: Run, export_dir: Path) -> PreTrainedModel:
    """The exported model, to be evaluated; of several ranks each reads its rows."""
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
    except Exception as error:  # what stands in it can be anything
        raise CheckpointError(
            f"{file} cannot be used: {reason(error)}. Remove it, and run the same command again to write it anew.",
            path=str(file),
        ) from None
    return RunResult(
        run_dir, written_plan(run_dir), finished=True, validation_loss=loss, export_dir=run_dir / export_dir
    )


def _with_prepared_dir(config: RunConfig) -> RunConfig:
    """The folder of shards that is given, that this run used before, or that its inputs name."""
    written = config.run_dir / "config.yaml"
    has_begun = written.is_file() and complete_checkpoints(config.run_dir / "checkpoints")
    if config.data.prepared_dir is None and has_begun:
        before = load_config(written).data.prepared_dir
        if before is not None and (Path(before) / MANIFEST).is_file():
            return config.model_copy(update={"data": config.data.model_copy(update={"prepared_dir": before})})
    return with_prepared_dir(config)


def _with_layers_of_before(config: RunConfig) -> RunConfig:
    """A run that has begun keeps its layers: at another micro-batch, others may have the least peak."""
    if config.plan.layers is not None or not complete_checkpoints(config.run_dir / "checkpoints"):
        return config
    if not (config.run_dir / "plan.json").is_file():
        return config
    layers = written_plan(config.run_dir).layers
    if len(layers) != config.plan.num_stages or sum(layers) != config.model.num_hidden_layers:
        return config  # another run: the comparison of keys will name the difference
    return config.model_copy(update={"plan": config.plan.model_copy(update={"layers": list(layers)})})


def _usable_checkpoint(root: Path, display: Display) -> Path | None:
    """The newest checkpoint whose files are as they were written; damaged ones are named and passed over."""
    complete = complete_checkpoints(root)
    for path in reversed(complete):
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError as error:
            display.note(f"passing over {path.name}: {error}")
            mark_damaged(path)
    if damaged := sorted(root.glob("*.damaged")):
        raise CheckpointError(
            f"no checkpoint in {root} is usable: {len(damaged)} are damaged, {damaged[-1].name} the last. "
            f"Remove {root} to begin the run anew.",
            path=str(root),
        )
    return None


def _open_metrics(config: RunConfig, state: CheckpointState | None) -> MetricsLog:
    tokens_seen = 0 if state is None else state.progress.tokens_seen
    sinks: list[Sink] = [SINKS[name](config.run_dir, config, tokens_seen) for name in config.log.report_to]
    keep_bytes = 0 if state is None else state.metrics_bytes
    return MetricsLog(config.run_dir / "metrics.jsonl", sinks, keep_bytes=keep_bytes)


def _keep_tokenizer(config: RunConfig) -> None:
    """A copy beside the checkpoints: a run that is moved elsewhere can still be exported."""
    target = config.run_dir / "tokenizer"
    if not target.is_dir():
        unfinished = config.run_dir / ".tokenizer.writing"
        shutil.copytree(config.prepared_dir / "tokenizer", unfinished, dirs_exist_ok=True)
        os.replace(unfinished, target)


def _write_documents(config: RunConfig, plan: Plan, world: World) -> None:
    run_dir = config.run_dir
    write_atomically(run_dir / "config.yaml", dump_config(config))
    write_atomically(run_dir / "plan.json", json.dumps(to_json(plan), indent=1) + "\n")
    write_atomically(run_dir / "environment.json", json.dumps(environment(world.device), indent=1) + "\n")


@contextmanager
def _exclusive(run_dir: Path) -> Iterator[None]:
    """One process per run directory. The lock goes with the process, however it ends."""
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
        yield


@contextmanager
def _disk_errors(run_dir: Path) -> Iterator[None]:
    """A full disk, wherever it is met: in the log, in the export, in the tokenizer's copy."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SteplmError) or not is_disk_full(error):
            raise
        raise explained(error, run_dir) from None
