from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jsonschema
import pytest
import yaml

from steplm.cli.init import starter_text
from steplm.compare.suite import read_suite
from steplm.config import (
    GrowthConfig,
    LogConfig,
    OptimConfig,
    PetConfig,
    RunConfig,
    Section,
    config_keys,
    config_schema,
    dump_config,
    load_config,
    recipes_dir,
)
from steplm.errors import ConfigError
from steplm.growth.operators import OPERATORS
from steplm.optim.schedules import SCHEDULES
from steplm.pet.adapters import METHODS
from steplm.planner.positions import POSITIONS
from steplm.problems import validated
from steplm.training.metrics import SINKS


def test_a_dumped_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config({"name": "x"}, ["plan.total_tokens=10B", "optim.learning_rate=[1e-3, 5e-4]", "pet.alpha=8"])
    (tmp_path / "x.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "x.yaml") == config


def test_an_override_is_read_as_yaml() -> None:
    config = load_config({}, ["plan.total_tokens=2.5M", "optim.max_grad_norm=null", "optim.learning_rate=1e-3"])
    assert config.plan.total_tokens == 2_500_000
    assert config.optim.max_grad_norm is None
    assert config.optim.learning_rate == 1e-3


def test_an_override_leaves_the_given_mapping_alone() -> None:
    values: dict = {"plan": {"num_stages": 2}}
    load_config(values, ["plan.num_stages=3"])
    assert values == {"plan": {"num_stages": 2}}


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("plan.num_stage=3", "Did you mean 'num_stages'?"),
        ("pln.num_stages=3", "Did you mean 'plan'?"),
        ("growth.rank=3", "Did you mean 'pet.rank'?"),
        ("growth.quite_other=3", "Known keys: operator, position."),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, [override])
    assert suggestion in str(caught.value)


def test_where_one_of_several_types_may_stand_the_key_is_told_once_and_alone() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, ["optim.learning_rate=fast"])
    message = str(caught.value)
    assert message.count("optim.learning_rate") == 1
    assert "a valid number" in message
    assert "or: Input should be a valid list (got 'fast')" in message


def test_a_suite_is_told_from_a_run_and_a_run_from_a_suite() -> None:
    with pytest.raises(ConfigError, match="cpu is a suite of runs: `steplm compare cpu`"):
        load_config("cpu")
    with pytest.raises(ConfigError, match=r"cpu\.yaml is a suite of runs"):
        load_config(recipes_dir() / "suites" / "cpu.yaml")
    for run in ("quickstart", recipes_dir() / "quickstart.yaml"):
        with pytest.raises(ConfigError, match="is one run, and no suite"):
            read_suite(run)


@pytest.mark.parametrize("key", ["0", "null", "no"])
def test_a_key_that_is_no_text_is_named(tmp_path: Path, key: str) -> None:
    (tmp_path / "run.yaml").write_text(f"model:\n  {key}: 1\n")
    with pytest.raises(ConfigError, match="is no text: quote it"):
        load_config(tmp_path / "run.yaml")


def test_embeddings_that_nothing_would_train_are_refused() -> None:
    lora = ["plan.num_stages=1", "method=lora", "plan.train_embeddings=first_stage"]
    with pytest.raises(ConfigError, match="trains nothing before its adapters"):
        load_config({}, lora)
    load_config({}, [*lora, "pet.warm_start=0.25"])


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, ["pet.rank=0", "train.precision=fp8", "plan.num_stage=2"])
    message = str(caught.value)
    assert all(part in message for part in ("pet.rank", "train.precision", "num_stage"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["plan.num_stages=13"], "plan.num_stages=13 is more than model.num_hidden_layers=12"),
        (["plan.layers=[5,5]"], "adds up to 10"),
        (["plan.layers=[12]"], "1 entries for num_stages=2"),
        (["plan.total_tokens=1M", "plan.total_flops=1e15"], "one token budget, not 2"),
        (["optim.learning_rate=[1e-3]"], "1 entries for plan.num_stages=2"),
        (["train.sequence_length=4096"], "more than model.max_position_embeddings=2048"),
        (["growth.operator=stack", "growth.position=upper"], "do not go together"),
        (["growth.position=top"], "do not go together"),
        (["plan.total_tokens=many"], "expected a number such as '10B'"),
        (["plan.budget=24potatoes"], "expected a number such as '24GiB'"),
        (["plan.tokens_per_stage=[1M, 0]"], "greater than 0"),
        (["growth.operator=stck"], "Did you mean 'stack'?"),
        (["nonsense"], "expected section.key=value"),
    ],
)
def test_values_that_contradict_each_other_are_refused_with_their_numbers(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, overrides)
    assert words in str(caught.value)


def test_environment_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  train: ${STEPLM_TEST_DIR}/a.jsonl\n  tokenizer: ${STEPLM_TEST_TOKENIZER:-train}\n")
    with pytest.raises(ConfigError, match="STEPLM_TEST_DIR is not set"):
        load_config(path)
    monkeypatch.setenv("STEPLM_TEST_DIR", "/somewhere")
    config = load_config(path)
    assert config.data.train == ["/somewhere/a.jsonl"]
    assert config.data.tokenizer == "train"


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "\x00"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)


def test_a_missing_file_suggests_the_nearest_recipe() -> None:
    with pytest.raises(ConfigError, match="llama_368m"):
        load_config("llama_386m")


@pytest.mark.parametrize("path", sorted(recipes_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    assert load_config(path).name == path.stem
    assert load_config(path.stem) == load_config(path)


def test_the_schema_names_every_key() -> None:
    schema = config_schema()
    named = set()
    for name, entry in schema["properties"].items():
        reference = entry.get("anyOf", [{}])[0].get("$ref", "").rpartition("/")[2]
        section = schema["$defs"].get(reference)
        named |= {f"{name}.{key}" for key in section["properties"]} if section else {name}
    assert named == set(config_keys())


def test_the_first_stage_has_the_first_learning_rate() -> None:
    config = RunConfig.model_validate({"optim": {"learning_rate": [1e-3, 2e-3]}})
    assert [config.learning_rate(num_growths) for num_growths in (0, 1)] == [1e-3, 2e-3]


def test_one_section_alone_is_validated_with_the_same_messages() -> None:
    with pytest.raises(ConfigError, match=r"operator: .*\(got 'interpolaton'\)\. Did you mean 'interpolation'\?"):
        validated(GrowthConfig, {"operator": "interpolaton"})
    with pytest.raises(ConfigError, match="do not go together"):
        validated(GrowthConfig, {"operator": "stack", "position": "upper"})


def schema_errors(text: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(config_schema())
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


@pytest.mark.parametrize("path", sorted(recipes_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_accepts_every_recipe(path: Path) -> None:
    assert schema_errors(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        starter_text(),
        "plan: {total_tokens: 500k, budget: 24GiB}",
        "plan: {num_stages: 2, tokens_per_stage: [10_000, 2.5M]}",
        "plan: {total_flops: 1e18}",
        "optim: {lr_scheduler_type: wsd}",
        "log: {report_to: wandb}",
        "log: {report_to: [tensorboard, wandb]}",
        "growth:\ndata: {train: a.jsonl}",
    ],
)
def test_the_schema_accepts_what_the_configuration_accepts(text: str) -> None:
    load_config(yaml.safe_load(text))
    assert schema_errors(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "plan: {total_tokens: 10 potatoes}",
        "plan: {budget: 24Gi}",
        "plan: {num_stage: 2}",
        "data: {max_train_tokens: 0}",
        "data: {train: 7}",
        "optim: {lr_scheduler_type: linear}",
        "log: {report_to: mlflow}",
    ],
)
def test_the_schema_refuses_what_the_configuration_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(yaml.safe_load(text))
    assert schema_errors(text) != []


def choices(annotation: Any) -> set[str]:
    """The strings of every ``Literal`` in an annotation."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*map(choices, get_args(annotation)))


@pytest.mark.parametrize(
    ("section", "key", "names"),
    [
        (GrowthConfig, "operator", {*OPERATORS}),
        (GrowthConfig, "position", {*POSITIONS}),
        (OptimConfig, "lr_scheduler_type", {*SCHEDULES}),
        (PetConfig, "method", {*METHODS, "none"}),
        (LogConfig, "report_to", {*SINKS}),
    ],
)
def test_the_choices_of_a_key_are_the_names_that_are_implemented(
    section: type[Section], key: str, names: set[str]
) -> None:
    assert choices(section.model_fields[key].annotation) == names


def test_a_number_without_a_point_is_a_number_in_free_form_keys_too() -> None:
    assert load_config({}, ["model.extra={rms_norm_eps: 1e-5}"]).model.extra == {"rms_norm_eps": 1e-5}


# Pairs of keys that cannot go together: the overrides, both keys as the error names them, and a way out.
CLASHES = {
    "a fused update cannot sum micro-batches": (
        ["memory.fused_backward=true", "optim.max_grad_norm=null", "train.gradient_accumulation_steps=4"],
        ["memory.fused_backward", "train.gradient_accumulation_steps=4"],
        "train.gradient_accumulation_steps=1",
    ),
    "a fused update cannot clip": (
        ["memory.fused_backward=true", "optim.max_grad_norm=0.5"],
        ["memory.fused_backward", "optim.max_grad_norm=0.5"],
        "optim.max_grad_norm=null",
    ),
    "fp32 weights have no master copy": (
        ["memory.master_weights=false", "train.precision=fp32"],
        ["memory.master_weights=false", "train.precision=fp32"],
        "train.precision=bf16",
    ),
    "a compiled layer cannot fetch weights": (
        ["memory.offload_frozen=true", "train.compile=true"],
        ["memory.offload_frozen", "train.compile"],
        "train.compile=false",
    ),
    "adapters on embeddings need adapters": (
        ["plan.train_embeddings=adapters", "pet.method=none"],
        ["plan.train_embeddings=adapters", "pet.method"],
        "pet.method=lora",
    ),
    "adapters on embeddings need frozen layers": (
        ["plan.train_embeddings=adapters", "method=growth"],
        ["plan.train_embeddings=adapters", "plan.freeze_old_layers"],
        "plan.freeze_old_layers=true",
    ),
}


@pytest.mark.parametrize("name", CLASHES)
def test_options_that_clash_are_refused_by_both_names_with_a_way_out_that_works(name: str) -> None:
    overrides, keys, way_out = CLASHES[name]
    with pytest.raises(ConfigError) as caught:
        load_config({}, overrides)
    message = str(caught.value)
    assert "\n" not in message, "one problem, not several"
    assert all(key in message for key in keys)
    assert "set " in message
    load_config({}, [*overrides, way_out])


@pytest.mark.parametrize("override", ["memory.fused_backward=true", "memory.fused_backward=false"])
def test_each_of_two_ways_out_of_a_clash_works(override: str) -> None:
    load_config({}, [override, "optim.max_grad_norm=null"])


@pytest.mark.parametrize(
    "override",
    [
        "memory.optimizer_states=4bit", "memory.frozen_weights=int4", "memory.reserve=0", "plan.objective=flops",
        "plan.train_embeddings=adapter", "train.gradient_checkpointing=old", "memory.offload=true",
        "memory.correction=0",
    ],
)  # fmt: skip
def test_a_memory_option_that_does_not_exist_is_refused_here_and_by_the_schema(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].rpartition(".")[2]):
        load_config({}, [override])
    section, _, rest = override.partition(".")
    key, _, value = rest.partition("=")
    assert schema_errors(f"{section}: {{{key}: {value}}}") != []


@pytest.mark.parametrize("text", ["memory: {reserve: 2GiB}", "memory: {optimizer_states: 8bit, frozen_weights: nf4}"])
def test_the_schema_accepts_memory_options(text: str) -> None:
    load_config(yaml.safe_load(text))
    assert schema_errors(text) == []


def test_a_device_must_have_the_corrected_peak_and_the_reserve() -> None:
    assert load_config({}).memory.needed_bytes(1000) == 1000 + 5 * 2**28
    assert load_config({}, ["memory.reserve=7", "memory.correction=1.5"]).memory.needed_bytes(1001) == 1502 + 7


@pytest.mark.parametrize(
    "override",
    ["memory.frozen_weights=nf4", "memory.offload_frozen=true", "train.gradient_checkpointing=frozen"],
)
def test_options_of_frozen_layers_are_refused_where_none_is_frozen(override: str) -> None:
    load_config({}, [override])
    with pytest.raises(ConfigError, match=r"plan\.freeze_old_layers=false leaves none") as caught:
        load_config({}, [override, "method=growth"])
    assert override.partition("=")[0] in str(caught.value)
