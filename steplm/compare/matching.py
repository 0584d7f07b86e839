"""Runs are compared at equal tokens or equal FLOPs; anything else is rejected."""

from __future__ import annotations

from steplm.compare.entries import RunKey, Suite
from steplm.errors import PlanError
from steplm.units import format_count


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
    if abs(ours - theirs) <= one_step:
        return
    raise PlanError(
        f"entry {entry.name!r} trains on {format_count(ours)} {unit} and the baseline {suite.config.baseline!r} on "
        f"{format_count(theirs)}: {ours / theirs - 1:+.2%}, {abs(ours - theirs) / one_step:.1f} optimizer steps. The "
        f"suite is matched on {entry.match}: give plan.total_tokens in `run`, for all, and in no entry, or match the "
        "entry on the other.",
        entry=entry.name,
        match=entry.match,
        run=ours,
        baseline=theirs,
        one_step=one_step,
    )
