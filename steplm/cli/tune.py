"""``steplm tune``: choose a learning rate by short runs at several."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console

from steplm.cli.compare import run_compare
from steplm.cli.hours import HERE, check_device, choose_speeds
from steplm.config import RunConfig, changed, token_budget
from steplm.errors import ConfigError
from steplm.planner.auto import load_config
from steplm.planner.hours import stage_times
from steplm.planner.plan import plan
from steplm.report.suite import load_suite
from steplm.units import format_count

FACTORS = (0.5, 1.0, 2.0)  # of the configured rate; the grid is extended if the best is at its edge
EXTEND = 2
SHARE = 0.1  # of the run's tokens, in each trial
ENTRY = "tuned"


def run_tune(
    source: str,
    overrides: list[str],
    *,
    share: float | None = None,
    minutes: float | None = None,
    jobs: int | None = None,
) -> int:
    """Run or resume the grid, print the command with the best rate and return the exit code."""
    if share is not None and minutes is not None:
        raise ConfigError("--share and --minutes both set the length of the trials: give one or the other.")
    config = load_config(source, overrides)
    if minutes is not None:
        share = share_for(minutes, config)
    elif share is None:
        share = SHARE
    suite = tuning_suite(config, share)
    exit_code = run_compare(suite, [], jobs=jobs)
    if exit_code:
        return exit_code
    (entry,) = load_suite(suite["output_dir"]).entries
    kept = [override for override in overrides if not override.startswith("optim.learning_rate=")]
    run = [source, *kept, f"optim.learning_rate={entry.learning_rate:g}"]
    if entry.at_edge:
        print("The best rate is the last one tried. To try rates beyond it:")
        length = ("--share", share) if minutes is None else ("--minutes", minutes)
        print(shlex.join(["steplm", "tune", *run, length[0], f"{length[1]:g}"]))
    print(f"Best on {100 * share:.3g}% of the tokens. A full-length run may need a lower rate.")
    print(shlex.join(["steplm", "train", *run]))
    return 0


def share_for(minutes: float, config: RunConfig) -> float:
    """The share of the run's tokens with which all trials take at most about this long on this machine, one by one.

    Raises:
        ConfigError: the time of the run cannot be estimated.
    """
    if config.distributed.world_size > 1:
        raise ConfigError("--minutes estimates the time of one device: give --share instead.")
    whole = plan(config)
    check_device(HERE, config, whole.shape, again=False)
    console = Console(stderr=True, highlight=False)
    times = stage_times(config, whole, choose_speeds(HERE, config, console))
    assert times is not None  # see ``check_device``
    trials = len(FACTORS) + EXTEND
    share = min(1.0, minutes * 60 / (trials * sum(time.seconds for time in times)))
    share = float(f"{share:.2g}")
    tokens = format_count(whole.total_tokens * share)
    console.print(f"trials    at most {trials}, of {tokens} tokens each", style="dim", markup=False)
    return share


def tuning_suite(config: RunConfig, share: float) -> dict[str, Any]:
    """A suite of runs on this share of the tokens, around the configured learning rate.

    Raises:
        ConfigError: the run has one learning rate per stage.
    """
    rate = config.optim.learning_rate
    if isinstance(rate, list):
        raise ConfigError(f"optim.learning_rate is {rate}, one for each stage. Give one number to tune around.")
    total_tokens = max(1, round(plan(config).total_tokens * share))
    return {
        "name": f"{config.name}-tune",
        "run": changed(config, token_budget(total_tokens=total_tokens)).model_dump(mode="json"),
        "output_dir": f"{config.run_dir}-tune",
        "baseline": ENTRY,
        "seeds": [config.seed],
        "tune": {"learning_rates": [rate * factor for factor in FACTORS], "extend": EXTEND, "seed": config.seed},
        # In a suite, `step` changes nothing but the method, which `set` then restores.
        "entries": [{"name": ENTRY, "method": "step", "label": config.name, "set": {"method": config.method}}],
    }
