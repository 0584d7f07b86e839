"""Optimizer states, gradients and weights in host memory: the run without, bit by bit, and the planned bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from steplm.config import RunConfig
from steplm.errors import PlanInfeasible
from steplm.models.folder import load_state
from steplm.optim.base import RuleBase
from steplm.optim.build import UpdateRules
from steplm.optim.host import HostParameters
from steplm.pet.host_linear import host_linears
from steplm.planner.plan import plan
from steplm.training import enter as enter_module
from steplm.training import loop as loop_module
from steplm.training import run as run_module
from steplm.training.environment import free_host_bytes
from steplm.training.metrics import read_metrics
from steplm.training.run import train
from steplm.types import HOST_WEIGHTS

Configure = Callable[..., RunConfig]
Trained = Callable[..., Path]
EqualRuns = Callable[[Path, Path], None]

OFFLOAD = "memory.offload_optimizer=true"
WITH_WEIGHTS = (OFFLOAD, "memory.offload_weights=true")
BASE = ("train.precision=bf16", "plan.layers=[2,2]")
SEVERAL = ("train.gradient_accumulation_steps=2", "train.gradient_accumulation_dtype=fp32")
ONE_STAGE = ("plan.num_stages=1", "plan.layers=[4]")
SHORT = "plan.total_tokens=512"
RUNS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "several micro-batches": SEVERAL,
    "several micro-batches in fp32": (*SEVERAL, "train.precision=fp32"),
    "no master weights": ("memory.optimizer_states=8bit", "memory.master_weights=false", *SEVERAL),
    "8-bit master weights": ("memory.master_weights=8bit",),
    "muon in 8 bits": ("optim.name=muon", "pet.rule=muon", "memory.optimizer_states=8bit"),
    "scale": ("optim.name=scale", "optim.max_grad_norm=null"),
    "galore": ("optim.name=galore", "optim.rank=4"),
    "old layers by another rule": ("method=thawed", "optim.old_layers=apollo_mini"),
    "badam": ("method=badam", *ONE_STAGE, "optim.switch_steps=3"),
    "relora": ("method=relora", *ONE_STAGE, "pet.restarts=2"),
    "tied embeddings": ("model.tie_word_embeddings=true",),
    "adapters on the embeddings": ("plan.train_embeddings=adapters",),
    "inside documents": ("data.within_documents=true",),
    "all in host memory": (
        "memory.offload_frozen=true", "memory.offload_activations=true", "memory.frozen_weights=nf4",
        "train.gradient_checkpointing=true",
    ),
}  # fmt: skip

TRAINING_OTHER_LAYERS = ("old layers by another rule", "badam")  # within a stage, which offload_weights does not allow


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("options", [(OFFLOAD,), WITH_WEIGHTS], ids=["optimizer", "weights"])
def test_a_run_with_its_optimizer_and_weights_in_host_memory_is_the_run_without(
    options: tuple[str, ...],
    name: str,
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    assert_equal_runs: EqualRuns,
) -> None:
    if options == WITH_WEIGHTS and name in TRAINING_OTHER_LAYERS:
        pytest.skip("memory.offload_weights does not go with it")
    # Planned bytes, of the device and of the host, are compared with measured ones at every entrance on the way.
    assert train(tiny_run(tmp_path, SHORT, *BASE, *RUNS[name], *options)).finished
    assert_equal_runs(tmp_path, trained(SHORT, *BASE, *RUNS[name]))


FUSED = ("memory.fused_backward=true", "optim.max_grad_norm=0.5")


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, whose streams and events are replaced, while tensors are on the CPU."""
    make = HostParameters.__init__

    def with_stream(self: HostParameters, *args: Any, **keys: Any) -> None:
        make(self, *args, **keys)
        self._stream = Mock()

    monkeypatch.setattr(HostParameters, "__init__", with_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Mock)


@pytest.fixture(params=["inline", "in threads"])
def how(request: pytest.FixtureRequest) -> str:
    if request.param == "in threads":
        request.getfixturevalue("in_threads")
    return str(request.param)


@pytest.mark.parametrize("on_host", [(OFFLOAD,), WITH_WEIGHTS])
@pytest.mark.parametrize("name", ["bf16", "no master weights", "muon in 8 bits"])
def test_updates_during_the_backward_pass_are_those_made_on_the_device_during_it(
    name: str,
    on_host: tuple[str, ...],
    how: str,
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    assert_equal_runs: EqualRuns,
) -> None:
    options = [option for option in RUNS[name] if option not in SEVERAL]
    assert train(tiny_run(tmp_path, SHORT, *BASE, *options, *FUSED, *on_host)).finished
    assert_equal_runs(tmp_path, trained(SHORT, *BASE, *options, *FUSED))


@pytest.mark.parametrize("on_host", [(OFFLOAD,), WITH_WEIGHTS])
def test_micro_batches_are_summed_before_an_update_during_the_last_ones_backward_pass(
    on_host: tuple[str, ...], how: str, tiny_run: Configure, trained: Trained, tmp_path: Path
) -> None:
    unclipped = (SHORT, *BASE, *SEVERAL, "optim.max_grad_norm=null")
    assert train(tiny_run(tmp_path, *unclipped, FUSED[0], *on_host)).finished
    ours, theirs = load_state(tmp_path / "export"), load_state(trained(*unclipped) / "export")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_parameter_that_the_last_micro_batch_does_not_reach_is_updated_too(how: str) -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    host = HostParameters(torch.device("cpu"), sums=True)
    host.set_parameters({"used": used, "unused": unused})
    summed = {}

    def update(name: str) -> None:
        gradient, host.parameters[name].grad = host.parameters[name].grad, None
        assert gradient is not None
        summed[name] = gradient.tolist()

    (used.sum() + unused.sum()).backward()
    with host.calling(update):
        used.sum().backward()
    assert summed == {"used": [2, 2, 2], "unused": [1, 1, 1]}
    assert all(parameter.grad is None for parameter in (used, unused, *host.parameters.values()))


def test_without_it_the_sums_of_micro_batches_are_rounded_and_with_it_they_are_not(
    tiny_run: Configure, trained: Trained, tmp_path: Path, assert_equal_runs: EqualRuns
) -> None:
    train(tiny_run(tmp_path, SHORT, *BASE, SEVERAL[0], OFFLOAD))
    assert_equal_runs(tmp_path, trained(SHORT, *BASE, *SEVERAL))


@pytest.mark.parametrize("options", [(), ("memory.optimizer_states=8bit", "memory.master_weights=false")])
def test_a_run_in_which_it_is_switched_on_and_off_is_the_unbroken_one(
    options: tuple[str, ...],
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    stop_before: Callable[[set[int]], None],
    assert_equal_runs: EqualRuns,
) -> None:
    unbroken = trained(*BASE, *options)
    stop_before({3, 7, 12})  # in the first stage, across the growth, in the second
    starts = [train(tiny_run(tmp_path, *BASE, *options, *switched)).finished
              for switched in (WITH_WEIGHTS, (), (OFFLOAD,), WITH_WEIGHTS)]  # fmt: skip
    assert starts == [False, False, False, True]
    assert_equal_runs(tmp_path, unbroken)


@pytest.mark.parametrize(("module", "function", "call"), [
    (loop_module, "train_step", 3), (loop_module, "train_step", 7), (enter_module, "grow", 1),
])  # fmt: skip
def test_killed_at_a_chosen_instant_such_a_run_equals_the_unbroken_one(
    module: object,
    function: str,
    call: int,
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    train_killed_at: Callable[..., None],
    assert_equal_runs: EqualRuns,
) -> None:
    options = (*BASE, *SEVERAL, *WITH_WEIGHTS, "train.save_steps=2")
    config = tiny_run(tmp_path, *options)
    train_killed_at(config, module, function, call)
    train(config)
    assert_equal_runs(tmp_path, trained(*options))


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_are(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_equal_runs: EqualRuns
) -> None:
    original = loop_module.train_step

    def spoiled(model, rules, batch, *args, **keys):  # type: ignore[no-untyped-def]
        hook = None
        if keys["learning_rate"] and spoiled.calls == 5:
            hook = model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
        spoiled.calls += 1
        result = original(model, rules, batch, *args, **keys)
        if hook is not None:
            hook.remove()
        return result

    monkeypatch.setattr(loop_module, "train_step", spoiled)
    for name, more in (("plain", ()), ("offloaded", (OFFLOAD,))):
        spoiled.calls = 0  # type: ignore[attr-defined]
        train(tiny_run(tmp_path / name, *BASE, *more))
        assert len(read_metrics(tmp_path / name / "metrics.jsonl", "skipped")) == 1
    assert_equal_runs(tmp_path / "offloaded", tmp_path / "plain")


def test_the_measured_peak_of_its_dry_run_is_the_planned_one(tiny_run: Configure, tmp_path: Path) -> None:
    options = (*BASE, "train.per_device_train_batch_size=8", "train.sequence_length=64", "plan.total_tokens=4096")
    larger = ("model.hidden_size=128", "train.gradient_accumulation_steps=2")
    for folder, on_host in (("optimizer", (OFFLOAD,)), ("weights", WITH_WEIGHTS)):
        train(tiny_run(tmp_path / folder, *options, *larger, *on_host))
    for start in (s for folder in tmp_path.iterdir() for s in read_metrics(folder / "metrics.jsonl", "stage_start")):
        assert start["measured_dry_run_bytes"] == pytest.approx(start["planned_dry_run_bytes"], rel=0.005)
        assert start["planned_bytes"] == start["measured_bytes"]
        assert start["planned_bytes"]["gradients"] == start["planned_bytes"]["optimizer"] == 0
        assert start["planned_bytes"]["host"] > 10 * start["planned_bytes"]["weights"] / 2


@pytest.mark.parametrize("options", [(OFFLOAD,), WITH_WEIGHTS])
def test_a_step_moves_the_planned_bytes(
    options: tuple[str, ...], tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = ("eval.eval_steps=99", "train.save_steps=99", "train.dry_run=false", "plan.total_tokens=1024")
    config = tiny_run(tmp_path, *BASE, *SEVERAL, *options, "plan.layers=[3,1]", *undisturbed)
    original, moved = loop_module.train_step, []

    def counted(model: nn.Module, host: HostParameters) -> tuple[int, int]:
        fetchers = {linear.fetcher for linear in host_linears(model).values()}
        return host.bytes_to_host, host.bytes_to_device + sum(fetcher.bytes_fetched for fetcher in fetchers)

    def counting(model, rules, *args, **keys):  # type: ignore[no-untyped-def]
        before = counted(model, rules.host)
        result = original(model, rules, *args, **keys)
        moved.append(tuple(after - earlier for after, earlier in zip(counted(model, rules.host), before, strict=True)))
        return result

    monkeypatch.setattr(loop_module, "train_step", counting)
    made = train(config).plan
    planned = [(stage.transfers.to_host, stage.transfers.to_device) for stage in made.stages]
    assert planned[0][0] == 2 * sum(term.num_bytes for term in made.stages[0].memory.terms if term.kind == HOST_WEIGHTS)
    # A stage's first step fetches less: the model was tried before, which leaves layers on the device.
    assert [max(step for step in moved if step[0] == to_host) for to_host, _ in planned] == planned
    assert {to_host for to_host, _ in moved} == {to_host for to_host, _ in planned}


def test_a_host_with_too_little_memory_is_refused_in_numbers_before_the_run(
    tiny_run: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, *BASE, OFFLOAD)
    needed = plan(config).host_bytes
    monkeypatch.setattr(run_module, "free_host_bytes", lambda: needed - 1)
    with pytest.raises(PlanInfeasible, match=r"the machine's free memory=.* KiB is too little: stage 2 keeps .* KiB"):
        train(config)
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(PlanInfeasible, match=r"plan\.host_budget=.* KiB is too little"):
        plan(tiny_run(tmp_path, *BASE, OFFLOAD, f"plan.host_budget={needed - 1}"))
    assert plan(tiny_run(tmp_path, *BASE, OFFLOAD, f"plan.host_budget={needed}")).host_bytes == needed


def test_free_host_memory_is_told_by_the_system() -> None:
    free_bytes = free_host_bytes()
    assert free_bytes is not None
    assert 2**20 < free_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


DELAYED = (OFFLOAD, "memory.delay_update=true")
FOR_DELAY = ("bf16", "several micro-batches in fp32", "no master weights", "muon in 8 bits", "badam", "relora")


@pytest.mark.parametrize("name", FOR_DELAY)
def test_delayed_updates_are_the_same_inline_and_in_threads_and_across_resumes(
    name: str,
    tiny_run: Configure,
    trained: Trained,
    tmp_path: Path,
    stop_before: Callable[[set[int]], None],
    request: pytest.FixtureRequest,
    assert_equal_runs: EqualRuns,
) -> None:
    options = (SHORT, *BASE, *RUNS[name], *DELAYED)
    unbroken = trained(*options)
    request.getfixturevalue("in_threads")
    stop_before({1, 3})
    assert [train(tiny_run(tmp_path, *options)).finished for _ in range(3)] == [False, False, True]
    assert_equal_runs(tmp_path, unbroken)


def test_a_delayed_update_reaches_the_device_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    host = HostParameters(torch.device("cpu"), sums=True)
    host.set_parameters({"weight": weight})
    rules = UpdateRules({"sgd": _Plain(host.parameters)}, host.parameters, host, delays=True)
    used = []
    for gradient in (1.0, 10.0, 100.0):
        used.append(weight.tolist())
        (weight * gradient).sum().backward()
        rules.step(1.0)
        rules.zero_grad()
    assert used == [[1, 2], [1, 2], [0, 1]]
    assert weight.tolist() == [-10, -9]
    assert rules.state_dict()[0]["weight.updated"].tolist() == [-110, -109]
    rules.finish_updates()
    assert weight.tolist() == [-110, -109]
    assert "weight.updated" not in rules.state_dict()[0]


class _Plain(RuleBase):
    """Gradient descent."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(weight_decay=0.0)
        self.set_parameters(parameters)

    def _new_states(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {}

    def _update(self, names: list[str], learning_rate: float, grad_scale: float) -> None:
        for name in names:
            gradient = self.parameters[name].grad
            assert gradient is not None
            self.parameters[name].data.sub_(gradient, alpha=learning_rate * grad_scale)
