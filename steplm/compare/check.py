"""Checks before the first run starts: configurations, plans, equal tokens or FLOPs, data, texts, folders."""

from __future__ import annotations

from functools import cache

from steplm.compare.entries import RunKey, Suite
from steplm.config import RunConfig
from steplm.data.prepare import OnProgress, prepare, with_prepared_dir
from steplm.data.tokens import Manifest
from steplm.errors import CheckpointMismatch, ConfigError, PlanError, SteplmError
from steplm.eval.text import require_text
from steplm.planner.methods import written
from steplm.units import format_count


def check_plans(suite: Suite) -> list[RunKey]:
    """Plan every run that the suite can lead to, and check that it matches the baseline.

    Raises:
        ConfigError: lists the problems of all entries at once.
    """
    problems: dict[str, None] = {}
    runs: list[RunKey] = []
    for entry in suite.entries.values():
        try:
            for run in suite.possible_runs(entry, {}):
                check_match(suite, run)
                _check_same_text(suite, run)
                runs.append(run)
        except SteplmError as error:
            text = str(error)
            problems[text if text.startswith("entry ") else f"entry {entry.name!r}: {text}"] = None
    if len(problems) > 1:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in the suite:\n{listing}", problems=list(problems))
    for problem in problems:
        raise ConfigError(problem, problems=[problem])
    by_folder: dict[str, RunKey] = {}
    for run in runs:
        if (other := by_folder.setdefault(run.dir, run)) != run:
            raise ConfigError(
                f"learning rates {other.learning_rate!r} and {run.learning_rate!r} of entry {run.entry!r} are the same "
                f"in six digits, and have one folder, {run.dir}. Leave one out.",
                folder=run.dir,
            )
    return runs


def check_match(suite: Suite, run: RunKey) -> None:
    """Check that a run has as many tokens, or training FLOPs, as the baseline, to within one optimizer step.

    Raises:
        PlanError: it does not; the message says by how much.
    """
    entry, baseline_run = suite.entries[run.entry], suite.baseline_run(run.seed)
    plan, baseline = suite.plan(run), suite.plan(baseline_run)
    step_tokens = max(suite.run_config(run).step_tokens, suite.run_config(baseline_run).step_tokens)
    if entry.match == "flops":
        unit, ours, theirs = "FLOPs", plan.training_flops, baseline.training_flops
        one_step = step_tokens * max(stage.flops_per_token for stage in (*plan.stages, *baseline.stages))
    else:
        unit, ours, theirs = "tokens", plan.total_tokens, baseline.total_tokens
        one_step = step_tokens
    if abs(ours - theirs) > one_step:
        raise PlanError(
            f"entry {entry.name!r} trains on {format_count(ours)} {unit} and the baseline {suite.config.baseline!r} on "
            f"{format_count(theirs)}: {ours / theirs - 1:+.2%}, {abs(ours - theirs) / one_step:.1f} optimizer steps. "
            f"The suite is matched on {entry.match}: give plan.total_tokens in `run`, for all, and in no entry, or "
            "match the entry on the other.",
            entry=entry.name,
            match=entry.match,
            run=ours,
            baseline=theirs,
            one_step=one_step,
        )


MEASURED_ON = ("eval.max_tokens", "data.validation", "data.validation_fraction", "data.text_field")


def _check_same_text(suite: Suite, run: RunKey) -> None:
    """Raise ``ConfigError`` if a run's losses are measured on different text than the baseline's."""
    ours, theirs = suite.run_config(run), suite.run_config(suite.baseline_run(run.seed))
    for name in MEASURED_ON:
        value, reference = written(ours, name), written(theirs, name)
        if value != reference:
            raise ConfigError(
                f"entry {run.entry!r} has {name}={value}, and the baseline {reference}: losses of other text cannot be "
                "compared. Set it in `run`, for all.",
                key=name,
            )


def check_texts(suite: Suite) -> None:
    """Raise ``DataError`` if a text of ``evaluate`` is missing, or has nothing to score."""
    for text in suite.config.evaluate.values():
        require_text(text.data, text.text_field)


def prepare_data(suite: Suite, runs: list[RunKey], on_progress: OnProgress | None = None) -> dict[RunKey, RunConfig]:
    """Create missing token shards; return the configuration of every run with the folder of its shards."""
    folders: dict[tuple[str, int], str] = {}
    configs = {}
    for run in runs:
        config = suite.run_config(run)
        inputs = (config.data.model_dump_json(), config.model.vocab_size)
        if inputs not in folders:
            resolved = with_prepared_dir(config)
            prepare(resolved, on_progress)
            folders[inputs] = str(resolved.prepared_dir)
        data = config.data.model_copy(update={"prepared_dir": folders[inputs]})
        configs[run] = config.model_copy(update={"data": data})
    return configs


def check_folders(suite: Suite, configs: dict[RunKey, RunConfig]) -> None:
    """Check that every existing run directory holds the run that the suite expects there.

    Raises:
        CheckpointMismatch: a directory holds a run that differs in its data, or in a key that affects the computation
            or the text that losses are measured on.
    """
    from steplm.training.checks import check_same_run
    from steplm.training.folder import RunFolder

    fingerprint = cache(lambda folder: Manifest.load(folder).fingerprint)  # most runs share a folder
    for config in configs.values():
        folder = RunFolder.open(config.run_dir)
        changed = check_same_run(config, folder)
        before, now = folder.data_fingerprint, fingerprint(config.prepared_dir)
        if before not in (None, now):
            changed.append(f"the prepared data: {before} -> {now}")
        if changed:
            raise CheckpointMismatch(
                f"{config.run_dir} holds a run of another configuration ({', '.join(changed)}). Undo the change, "
                "remove the folder, or give the suite another output_dir.",
                changed=changed,
            )
