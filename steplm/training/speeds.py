"""The speeds of this machine, timed on small models in less than a minute and cached in the user's cache folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from steplm.config import RunConfig, load_config
from steplm.cost.seconds import HOST_UPDATE, UPDATE, Speeds
from steplm.cost.work import KINDS, Work, step_work
from steplm.data.loader import Batch
from steplm.distributed.world import World
from steplm.errors import ConfigError
from steplm.files import write_atomically
from steplm.models.build import DTYPES, hf_config, initial_state
from steplm.optim.base import global_grad_norm
from steplm.planner.plan import plan
from steplm.schedule import Phase
from steplm.training.assemble import Assembled, PhaseStart, assemble
from steplm.training.environment import environment
from steplm.training.step import StepOptions, forward_backward, step_options
from steplm.types import ModelShape, TrainState

SECONDS = 40.0  # of timing; building the models takes extra
LEAST_ROUNDS = 3
FASTEST = 1e18  # units per second, for a kind of work with no measurable cost

Clock = Callable[[], float]

# Each small model stresses some kinds of work more than the others do. The sizes are for a CPU; an accelerator gets
# ``ACCELERATOR_SEQUENCES`` times as many sequences.
BASE = {
    "plan": {"num_stages": 1, "total_tokens": 1_000_000},
    "pet": {"rank": 16},
    "data": {"train": "unused"},
    "train": {"loss_chunk_size": 512},
}
ACCELERATOR_SEQUENCES = 16


def _kind(
    hidden_size: int, layers: int, sequences: int, length: int, *overrides: str, vocab_size: int = 512
) -> list[str]:
    return [
        f"model.hidden_size={hidden_size}",
        f"model.intermediate_size={hidden_size * 8 // 3 // 16 * 16}",
        f"model.num_attention_heads={max(hidden_size // 64, 2)}",
        f"model.num_hidden_layers={layers}",
        f"model.vocab_size={vocab_size}",
        f"train.sequence_length={length}",
        f"train.per_device_train_batch_size={sequences}",
        *overrides,
    ]


_GROWN = ("plan.num_stages=2", "plan.layers=[2,1]")
_KINDS = {
    "launches": _kind(64, 4, 1, 32),
    "narrow": _kind(256, 2, 2, 256),
    "many tokens": _kind(256, 2, 8, 256),
    "wide": _kind(768, 1, 1, 256),
    "long": _kind(256, 2, 1, 1024),
    "vocabulary": _kind(256, 1, 2, 256, vocab_size=16384),
    "adapters": _kind(256, 3, 2, 256, *_GROWN),
    "wide adapters": _kind(512, 3, 1, 256, *_GROWN),
}
_BF16_KINDS = {
    "8-bit states": _kind(512, 2, 1, 64, "memory.optimizer_states=8bit"),
    "rounding": _kind(512, 2, 1, 64, "memory.master_weights=false"),
    "8-bit masters": _kind(512, 2, 1, 64, "memory.master_weights=8bit"),
    "muon": _kind(256, 1, 1, 64, "optim.name=muon"),
    "int8": _kind(512, 3, 1, 64, *_GROWN, "memory.frozen_weights=int8"),
    "nf4": _kind(512, 3, 1, 64, *_GROWN, "memory.frozen_weights=nf4"),
    "bus": _kind(256, 2, 2, 256, "memory.offload_activations=true"),
}


@dataclass
class Trial:
    """A phase on random tokens, ready for timing."""

    config: RunConfig
    shape: ModelShape
    phase: Phase
    assembled: Assembled
    batch: Batch
    options: StepOptions

    def forward_backward(self) -> None:
        self.assembled.rules.zero_grad()
        forward_backward(self.assembled.model, self.batch, self.options)

    def update(self) -> None:
        """Compute the gradient norm and step; call ``forward_backward`` first."""
        global_grad_norm(self.assembled.rules.parameters.values())
        self.assembled.rules.step(1e-5)


def make_trial(config: RunConfig, device: torch.device, stage: int | None = None) -> Trial:
    """Build a stage of a run (default: the last) with fresh weights and random tokens."""
    planned = plan(config)
    phase = planned.stages[-1 if stage is None else stage - 1].highest_phase
    model = config.model.hf_config()
    model_config = hf_config(model, phase.num_hidden_layers)
    weights = initial_state(model_config, seed=0, dtype=DTYPES[config.train.precision])
    start = PhaseStart(model_config, weights, (), TrainState(phase.stage, phase.index, 0, 0, 0))
    world = World(device)
    assembled = assemble(config, planned.shape, phase, start, world, check=False)
    size = (config.global_batch_size, config.train.sequence_length)
    tokens = torch.randint(0, config.model.vocab_size, size, generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, tokens.roll(-1, dims=1))
    return Trial(config, planned.shape, phase, assembled, batch, step_options(config, world))


def least_seconds(
    trials: Sequence[Trial], device: torch.device, seconds: float, clock: Clock = time.perf_counter
) -> list[tuple[float, float]]:
    """Minimum seconds of each trial's forward and backward pass and of its update.

    Trials take turns in rounds, so that temporary load on the machine affects all of them alike. The first round is a
    warmup.
    """
    least = [(float("inf"), float("inf"))] * len(trials)
    stop, rounds = time.monotonic() + seconds, 0
    while rounds < LEAST_ROUNDS or time.monotonic() < stop:
        for index, trial in enumerate(trials):
            passes = _seconds(trial.forward_backward, device, clock)
            update = min(_seconds(trial.update, device, clock) for _ in range(2))
            if rounds:
                least[index] = (min(least[index][0], passes), min(least[index][1], update))
        rounds += 1
    return least


def small_trials(device: torch.device) -> list[Trial]:
    """Build the small models that the speeds are fitted to."""
    trials = []
    for precision in ("fp32", "bf16"):
        kinds = _KINDS if precision == "fp32" else _KINDS | _BF16_KINDS
        for overrides in kinds.values():
            config = load_config(BASE, [*overrides, f"train.precision={precision}", f"train.device={device.type}"])
            if device.type == "cuda":
                sequences = ACCELERATOR_SEQUENCES * config.train.per_device_train_batch_size
                config = load_config(config.model_dump(mode="json"), [f"train.per_device_train_batch_size={sequences}"])
            trials.append(make_trial(config, device))
    return trials


def speeds_of(trials: Sequence[Trial], times: Sequence[tuple[float, float]], device: torch.device) -> Speeds:
    """Fit speeds to the times from ``least_seconds``."""
    is_cuda, samples = device.type == "cuda", list[tuple[list[Work], float]]()
    for trial, (passes, update) in zip(trials, times, strict=True):
        work = step_work(trial.config, trial.shape, trial.phase, on_cuda=is_cuda) or ()
        samples.append(([each for each in work if each.part != UPDATE], passes))
        samples.append(([each for each in work if each.part == UPDATE], update))
    name = environment(device)["device"]
    return Speeds(name, fit_speeds(samples, asynchronous=is_cuda), is_cuda, "timed on this machine")


def fit_speeds(samples: Sequence[tuple[Sequence[Work], float]], *, asynchronous: bool) -> dict[str, float]:
    """Fit the speed of each kind of work to the measured seconds, by non-negative least squares on relative errors.

    On an accelerator, kernel launches overlap with compute. The fit then covers compute only, and the launch speed is
    the highest number of launches per second in any sample.

    Args:
        samples: pairs of the work done and its seconds.
    """
    apart = ("host update", *(["launches"] if asynchronous else []))
    kinds = [kind for kind in KINDS if kind not in apart]
    amounts = np.array([[sum(w.amount for w in work if w.kind == kind) for kind in kinds] for work, _ in samples])
    seconds = np.array([measured for _, measured in samples])
    scale = amounts.max(axis=0)
    scale[scale == 0] = 1.0
    times, _ = nnls(amounts / scale / seconds[:, None], np.ones(len(samples)))
    times = times / scale
    speeds = {kind: 1 / max(value, 1 / FASTEST) for kind, value in zip(kinds, times, strict=True)}
    speeds["host update"] = HOST_UPDATE
    if asynchronous:
        launched = [(sum(w.amount for w in work if w.kind == "launches"), measured) for work, measured in samples]
        speeds["launches"] = max(count / measured for count, measured in launched)
    return speeds


def speeds_here(device: torch.device, *, again: bool = False, note: Callable[[str], Any] = print) -> Speeds:
    """The cached speeds of this machine; timed first if there are none or if ``again`` is set."""
    path = cache_file()
    key = _key(device)
    kept = _kept(path)
    if key not in kept or again:
        note(f"timing small models on {environment(device)['device']}: about {SECONDS + 10:.0f} seconds")
        trials = small_trials(device)
        speeds = speeds_of(trials, least_seconds(trials, device, SECONDS), device)
        kept[key] = {"asynchronous": speeds.asynchronous, "per_second": dict(speeds.per_second)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(kept, indent=1) + "\n")
        note(f"kept in {path}")
    values = kept[key]
    return Speeds("here", values["per_second"], values["asynchronous"], f"timed on {key}")


def cache_file() -> Path:
    """``steplm/speeds.json`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steplm" / "speeds.json"


def _key(device: torch.device) -> str:
    return f"{environment(device)['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _kept(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ConfigError(f"{path} cannot be read. Delete it: the machine is then timed again.") from None
    # Skips entries from a version with other kinds of work.
    return {key: value for key, value in values.items() if set(value["per_second"]) == set(KINDS)}


def _seconds(call: Callable[[], object], device: torch.device, clock: Clock) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started
