"""The parts of a suite that follow its runs: zero-shot tasks, instruction tuning and MT-Bench.

Each part calls the code of its own command and writes the same output:

DIR/evaluation/       zero-shot tasks, as ``steplm eval -o``; the losses of instruction tuning
DIR/runs/…/sft/       a tuned model, as ``steplm sft -o``
DIR/mt_bench/         MT-Bench, as ``steplm mtbench -o``
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from steplm.compare.display import SuiteDisplay
from steplm.compare.entries import Suite
from steplm.compare.lock import exclusive
from steplm.compare.suite import InstructionsConfig, MtBenchConfig, TasksConfig
from steplm.config import RunConfig
from steplm.data.sources import find_sources

if TYPE_CHECKING:
    from steplm.report.suite import SuiteRecord
    from steplm.sft.run import SftResult


def parts(suite: Suite) -> list[str]:
    """Describe the parts of a suite, one per line."""
    config = suite.config.afterwards
    if config is None:
        return []
    models = ", ".join(f"{name} (seed {seed})" for name, (_, seed) in suite.last_models.items())
    lines = [f"then, of {models}:"]
    if config.tasks is not None:
        items = "" if config.tasks.limit is None else f", the first {config.tasks.limit:,} items of each"
        lines.append(f"  zero-shot tasks: {', '.join(config.tasks.names)}{items}")
    if config.sft is not None:
        how = "all parameters" if config.sft.lora_rank is None else f"adapters of rank {config.sft.lora_rank}"
        lines.append(f"  instruction tuning: {', '.join(config.sft.data)}; {how}")
    if config.mtbench is not None:
        tuned = " of the tuned models" if config.sft is not None else ""
        lines.append(f"  MT-Bench{tuned}: {config.mtbench.mode}, judged by {config.mtbench.judge_model}")
    return lines


def check_parts(suite: Suite) -> None:
    """Check everything that can fail early, before the first run: libraries, files, tasks, the judge's key.

    Raises:
        ConfigError, DataError, HubUnavailable: a check fails; the message says how to fix it.
    """
    config = suite.config.afterwards
    if config is None:
        return
    if config.tasks is not None:
        from steplm.eval.zero_shot import tasks_of

        tasks_of(
            config.tasks.names,
            num_fewshot=config.tasks.num_fewshot,
            tasks_path=config.tasks.paths,
            tasks_data=config.tasks.data,
        )
    if config.sft is not None:
        from steplm.models.build import hf_config
        from steplm.sft.run import check_tuning

        find_sources(config.sft.data)
        for run in _configs(suite).values():
            check_tuning(config.sft.keys, hf_config(run.model.hf_config()))
    if config.mtbench is not None:
        _mt_bench(suite, config.mtbench, {name: suite.directory / name for name in suite.last_models}, check_only=True)


def run_parts(suite: Suite, record: SuiteRecord, display: SuiteDisplay) -> int:
    """Run every part on the finished models, skipping work that is already done, and return the exit code.

    Raises:
        SteplmError: a part failed; completed work is kept.
    """
    config = suite.config.afterwards
    if config is None:
        return 0
    run_dirs = {
        name: suite.directory / run.dir
        for name, (entry, seed) in suite.last_models.items()
        for run in record.runs_of(entry.name)
        if run.seed == seed and run.status == "finished"
    }
    for name in suite.last_models:
        if name not in run_dirs:
            display.note(f"afterwards: {name} has no finished run and is left out", "yellow")
    if not run_dirs:
        return 1
    models = {name: folder / "export" for name, folder in run_dirs.items()}
    with exclusive(suite.directory, display.waiting_for_runs):
        if config.tasks is not None:
            _score_tasks(suite, config.tasks, models)
        if config.sft is not None:
            models, stop_signal = _tune(suite, config.sft, run_dirs, display)
            if stop_signal is not None:
                return 128 + stop_signal
        return 0 if config.mtbench is None else _mt_bench(suite, config.mtbench, models)


def _configs(suite: Suite) -> dict[str, RunConfig]:
    """The configuration of each model's run, with any possible learning rate, as the best may not be known yet."""
    runs = {name: next(suite.possible_runs(entry, {})) for name, (entry, _) in suite.last_models.items()}
    return {name: suite.run_config(run) for name, run in runs.items()}


def _device(suite: Suite) -> str:
    return next(iter(_configs(suite).values())).train.device


def _score_tasks(suite: Suite, tasks: TasksConfig, models: Mapping[str, Path]) -> None:
    from steplm.cli.evaluate import run_eval

    run_eval(
        [str(folder) for folder in models.values()],
        [],
        tasks.names,
        names=list(models),
        limit=tasks.limit,
        num_fewshot=tasks.num_fewshot,
        batch_size=tasks.batch_size,
        tasks_path=[Path(path) for path in tasks.paths],
        tasks_data=None if tasks.data is None else Path(tasks.data),
        output=suite.directory / "evaluation",
        device=_device(suite),
    )


def _tune(
    suite: Suite, config: InstructionsConfig, run_dirs: Mapping[str, Path], display: SuiteDisplay
) -> tuple[dict[str, Path], int | None]:
    """Tune the models; return their folders and the signal that stopped the tuning, if any."""
    from steplm.models.device import free_memory
    from steplm.sft.run import instruction_tune

    keys = config.keys
    if "device" not in keys.model_fields_set:
        keys = keys.model_copy(update={"device": _device(suite)})
    results: dict[str, SftResult] = {}
    for name, run_dir in run_dirs.items():

        def say(text: str, name: str = name) -> None:
            for line in text.splitlines():
                display.note(f"{name}: {line}")

        folder = run_dir / "sft"
        results[name] = instruction_tune(run_dir / "export", config.data, keys, output_dir=folder, say=say)
        if results[name].stop_signal is not None:
            return {}, results[name].stop_signal
        free_memory()
        if not suite.config.keep_checkpoints:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    _save_losses(suite.directory / "evaluation", results)
    return {name: run_dirs[name] / "sft/export" for name in results}, None


def _save_losses(folder: Path, results: Mapping[str, SftResult]) -> None:
    from steplm.report.evaluations import Evaluation, save_evaluation
    from steplm.report.runs import NOT_YET
    from steplm.report.tables import Cell, Table

    def loss(value: float | None) -> Cell:
        return Cell(NOT_YET) if value is None else Cell(f"{value:.4f}", value)

    columns = ("model", "steps", "train loss", "held-out loss before", "held-out loss")
    rows = tuple(
        (
            Cell(name),
            Cell(f"{result.num_steps:,}", result.num_steps),
            *map(loss, (result.train_loss, result.validation_loss_before, result.validation_loss)),
        )
        for name, result in results.items()
    )
    table = Table("Losses", columns, rows, "Nats per token of the answers.")
    folder.mkdir(parents=True, exist_ok=True)
    save_evaluation(folder, "sft", Evaluation("Instruction tuning", (table,)))


def _mt_bench(suite: Suite, options: MtBenchConfig, models: Mapping[str, Path], *, check_only: bool = False) -> int:
    from steplm.cli.mtbench import run_mtbench

    return run_mtbench(
        [str(folder) for folder in models.values()],
        options,
        names=list(models),
        output=suite.directory / "mt_bench",
        device=_device(suite),
        check_only=check_only,
    )
