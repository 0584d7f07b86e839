"""Which keys each method reads, and what each refuses."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from steplm.config import RunConfig, load_config
from steplm.errors import ConfigError
from steplm.planner.methods import METHOD_KEYS, METHODS, check_keys, value_and_default
from steplm.planner.plan import as_vanilla, plan
from steplm.planner.shape import shape_from_hf_config
from steplm.planner.stages import StagePrices
from steplm.schedule import Trained

TINY: dict[str, Any] = {
    "model": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4},
    "plan": {"total_tokens": 64 * 64},
    "pet": {"rank": 4},
    "optim": {"rank": 4, "switch_steps": 8},
    "train": {"sequence_length": 16, "per_device_train_batch_size": 4},
}
# What a method needs to be one.
NEEDED: dict[str, tuple[str, ...]] = {
    "relora": ("pet.restarts=1", "pet.warm_start=0.25"),
    "thawed": ("optim.old_layers=apollo_mini",),
}
OTHER_VALUES = {
    "plan.train_embeddings": "first_stage",
    "pet.restarts": "2",
    "pet.restart_keep": "0.5",
    "pet.warm_start": "0.5",
    "optim.old_layers": "galore",
}


def of_method(name: str, *overrides: str) -> RunConfig:
    stages = f"plan.num_stages={2 if METHODS[name].grows else 1}"
    return load_config(TINY, [f"method={name}", stages, *NEEDED.get(name, ()), *overrides])


def test_every_key_that_only_some_methods_read_is_tried() -> None:
    assert OTHER_VALUES.keys() == set(METHOD_KEYS)
    for key, value in OTHER_VALUES.items():
        set_to, default = value_and_default(load_config(TINY, [f"{key}={value}"]), key)
        assert set_to != default


@pytest.mark.parametrize(("name", "key"), list(product(METHODS, OTHER_VALUES)))
def test_a_method_refuses_the_keys_that_it_does_not_read_and_names_those_that_do(name: str, key: str) -> None:
    config = of_method(name, f"{key}={OTHER_VALUES[key]}")
    if key in METHODS[name].reads:
        plan(config)
        return
    readers = [other for other, method in METHODS.items() if key in method.reads]
    with pytest.raises(ConfigError, match=f"method={name} does not read {key}, which is ") as caught:
        plan(config)
    assert str(caught.value).endswith(f"set method to one of {', '.join(readers)}.")
    assert caught.value.key == key


@pytest.mark.parametrize(("name", "key"), list(product(METHODS, OTHER_VALUES)))
def test_a_key_that_a_method_reads_changes_its_phases_or_what_is_kept_between_them(name: str, key: str) -> None:
    """So a method says no more than it reads."""
    if key not in METHODS[name].reads:
        return
    before, after = (plan(of_method(name, *more)).schedule for more in ((), (f"{key}={OTHER_VALUES[key]}",)))
    assert (before != after) == (key != "pet.restart_keep")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_growth_has_one_stage(name: str) -> None:
    more_stages = load_config(TINY, [f"method={name}", "plan.num_stages=2", *NEEDED.get(name, ())])
    if METHODS[name].grows:
        assert plan(more_stages).num_stages == 2
        return
    with pytest.raises(ConfigError, match=rf"method={name} has one stage: set plan\.num_stages=1 \(it is 2\)"):
        plan(more_stages)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_freezes_has_a_layer_that_is_not_trained_and_the_others_have_none(name: str) -> None:
    schedule = plan(of_method(name)).schedule
    assert any(phase.frozen_layers for phase in schedule.phases) == METHODS[name].freezes


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("lora", ["pet.method=none"], "method=lora needs adapters"),
        ("relora", ["pet.method=none"], "method=relora needs adapters"),
        ("relora", ["pet.restarts=0", "pet.warm_start=0"], r"needs pet\.restarts of 1 or more, or pet\.warm_start"),
        ("relora", ["pet.warm_start=0", "plan.train_embeddings=first_stage"], "give method=relora a warm start"),
        ("relora", ["pet.restarts=100"], r"48 steps are too few for pet\.restarts=100 and pet\.warm_start=0\.25"),
        ("step", ["pet.restarts=100"], "steps are too few"),
        ("thawed", ["optim.old_layers=null"], r"set optim\.old_layers"),
        ("growth", ["plan.train_embeddings=adapters"], "set method=step"),
        ("thawed", ["plan.train_embeddings=adapters"], "set method=step"),
        ("step", ["pet.method=none", "pet.restarts=1"], "restarts adapters, and this run has none"),
        ("badam", ["memory.frozen_weights=nf4"], "keeps layers frozen for good, and badam trains them again"),
        ("badam", ["memory.offload_frozen=true"], "keeps layers frozen for good, and badam trains them again"),
        ("badam", ["train.gradient_checkpointing=frozen"], "keeps layers frozen for good, and badam trains them again"),
        ("badam", ["distributed.world_size=2"], "changes which layers are trained, which FSDP2 does not allow"),
        ("vanilla", ["optim.name=galore", "distributed.world_size=2"], r"set distributed\.shard_size=1"),
        (
            "vanilla",
            ["optim.name=muon", "distributed.world_size=2", "memory.fused_backward=true"],
            r"gathers matrices over the devices",
        ),
        ("vanilla", ["optim.name=galore", "memory.optimizer_states=8bit"], "galore has its states in fp32"),
        ("vanilla", ["optim.name=galore", "memory.master_weights=8bit"], "galore cannot keep memory.master_weights=8b"),
        ("vanilla", ["memory.master_weights=galore"], "names one update rule of several, and adamw is the only one"),
        ("thawed", ["memory.master_weights=galore"], "names one update rule of several"),
    ],
)
def test_what_a_method_cannot_do_is_refused_with_what_to_change(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(of_method(name, *overrides))


@pytest.mark.parametrize("name", METHODS)
def test_ordinary_pre_training_on_the_same_batches_is_the_vanilla_of_every_method(name: str) -> None:
    config = of_method(name, "optim.name=muon")
    vanilla = plan(as_vanilla(config))
    (phase,) = vanilla.schedule.phases
    assert set(phase.layers) == {phase.embeddings_and_head} == {Trained()}
    assert vanilla.peak_bytes == plan(config).vanilla_peak_bytes


@pytest.mark.parametrize("name", METHODS)
def test_kinds_of_phases_without_tokens_are_those_of_a_schedule_in_the_same_shares(name: str) -> None:
    """What the planner prices before there are tokens is what is trained then."""
    config = of_method(name)
    prices = StagePrices(config, shape_from_hf_config(config.model.hf_config()))
    for num_new, num_old in ((4, 0), (2, 2))[: 1 + METHODS[name].grows]:
        kinds, made = (prices.drafts(num_new, num_old, steps) for steps in (None, 64))
        assert sum(draft.steps for draft in kinds) == pytest.approx(1)
        shares: dict[Any, float] = {}
        for draft in made:
            key = draft.layers, draft.embeddings_and_head
            shares[key] = shares.get(key, 0) + draft.steps / 64
        assert shares == pytest.approx({(d.layers, d.embeddings_and_head): d.steps for d in kinds})


def test_keys_are_checked_before_anything_is_priced() -> None:
    config = of_method("lora", "optim.old_layers=galore", "pet.rank=1000")
    with pytest.raises(ConfigError, match=r"does not read optim\.old_layers"):
        check_keys(config)
    with pytest.raises(ConfigError, match=r"does not read optim\.old_layers"):
        plan(config)
