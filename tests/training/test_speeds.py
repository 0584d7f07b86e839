"""The speeds of this machine: fitted from seconds, kept, and not timed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steplm.config import load_config
from steplm.cost.seconds import UPDATE
from steplm.cost.work import KINDS, Work
from steplm.errors import ConfigError
from steplm.training import speeds as module
from steplm.training.speeds import cache_file, fit_speeds, least_seconds, make_trial, speeds_here

CPU = torch.device("cpu")


def samples(true: dict[str, float], num: int = 60) -> list[tuple[list[Work], float]]:
    """Random amounts of every kind of work, with the seconds that a device of these speeds takes."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(num):
        work = [Work("layers forward", kind, rate * generator.random()) for kind, rate in true.items()]
        made.append((work, sum(each.amount / true[each.kind] for each in work)))
    return made


def test_the_speeds_that_made_the_seconds_are_found_again() -> None:
    true = {kind: 10.0 ** (3 + index) for index, kind in enumerate(KINDS) if kind != "host update"}
    fitted = fit_speeds(samples(true), asynchronous=False)
    assert {kind: fitted[kind] for kind in true} == pytest.approx(true, rel=1e-6)


def test_no_speed_is_negative_where_the_seconds_are_noisy() -> None:
    true = dict.fromkeys(KINDS, 1e9)
    generator = np.random.default_rng(1)
    noisy = [(work, seconds * (0.5 + generator.random())) for work, seconds in samples(true, 20)]
    assert all(rate > 0 for rate in fit_speeds(noisy, asynchronous=False).values())


def test_an_accelerators_launches_are_those_of_the_sample_that_launched_most() -> None:
    computing = ([Work("layers forward", "bf16 products", 1e12), Work("layers forward", "launches", 100)], 1.0)
    tiny = ([Work("layers forward", "bf16 products", 1e6), Work("layers forward", "launches", 100)], 0.001)
    fitted = fit_speeds([computing, tiny], asynchronous=True)
    assert fitted["launches"] == 1e5


def tiny_trial() -> module.Trial:
    model = ["model.hidden_size=32", "model.intermediate_size=64", "model.num_attention_heads=2", "model.vocab_size=64"]
    size = ["model.num_hidden_layers=2", "plan.total_tokens=10k", "pet.rank=4", "train.sequence_length=16"]
    return make_trial(
        load_config({"data": {"train": "unused"}}, [*model, *size, "train.device=cpu", "train.precision=fp32"]), CPU
    )


def test_passes_and_update_are_timed_apart() -> None:
    trial = tiny_trial()
    before = {name: parameter.detach().clone() for name, parameter in trial.assembled.model.named_parameters()}
    ticks = iter(range(1000))
    ((passes, update),) = least_seconds([trial], CPU, 0.0, clock=lambda: next(ticks))
    assert (passes, update) == (1, 1)  # from one tick to the next
    moved = {n for n, p in trial.assembled.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trial.assembled.rules.parameters)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A cache of its own, one tiny model instead of the small ones, and a list of the times that it was timed."""
    calls: list[Any] = []

    def timed(trials: Any, *_: Any) -> list[tuple[float, float]]:
        calls.append(trials)
        return [(0.5, 0.25)] * len(trials)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "small_trials", lambda device: [tiny_trial()])
    monkeypatch.setattr(module, "least_seconds", timed)
    return calls


def test_a_machine_is_timed_once_and_again_when_asked(counted: list[Any], tmp_path: Path) -> None:
    notes: list[str] = []
    first, second = (speeds_here(CPU, note=notes.append) for _ in range(2))
    assert len(counted) == 1
    assert first == second
    assert cache_file() == tmp_path / "steplm" / "speeds.json"
    assert any(str(cache_file()) in note for note in notes)
    speeds_here(CPU, again=True, note=notes.append)
    assert len(counted) == 2


def test_other_threads_are_another_machine(counted: list[Any]) -> None:
    threads = torch.get_num_threads()
    try:
        speeds_here(CPU, note=lambda text: None)
        torch.set_num_threads(threads + 1)
        speeds_here(CPU, note=lambda text: None)
    finally:
        torch.set_num_threads(threads)
    assert len(counted) == 2


def test_a_damaged_file_is_named(counted: list[Any]) -> None:
    speeds_here(CPU, note=lambda text: None)
    cache_file().write_text("{")
    with pytest.raises(ConfigError, match=r"speeds\.json cannot be read\. Delete it"):
        speeds_here(CPU, note=lambda text: None)


def test_the_small_models_have_every_kind_of_work() -> None:
    kinds = set()
    for trial in module.small_trials(CPU):
        work = module.step_work(trial.config, trial.shape, trial.phase, on_cuda=False) or ()
        assert any(each.part == UPDATE for each in work)
        kinds |= {each.kind for each in work}
    assert kinds == set(KINDS) - {"host update"}  # of accelerators alone
