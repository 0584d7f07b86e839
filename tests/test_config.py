from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jsonschema
import pytest
import yaml
from transformers import AutoConfig

from steplm.cli.init import starter_text
from steplm.compare.suite import read_suite
from steplm.config import (
    ONE_STAGE_METHODS,
    GrowthConfig,
    LogConfig,
    MemoryConfig,
    OptimConfig,
    PetConfig,
    RunConfig,
    Section,
    config_keys,
    config_schema,
    dump_config,
    load_config,
    load_written_config,
    recipes_dir,
)
from steplm.cost.rules import RULES
from steplm.errors import ConfigError
from steplm.growth.operators import OPERATORS
from steplm.models.build import hf_config, meta_model
from steplm.models.shape import shape_of
from steplm.old_keys import RENAMED, translate_old_keys
from steplm.optim.build import MAKERS
from steplm.optim.schedules import SCHEDULES
from steplm.pet.adapters import ADAPTERS
from steplm.planner.methods import METHODS
from steplm.planner.plan import plan
from steplm.planner.positions import POSITIONS
from steplm.planner.shape import shape_from_hf_config
from steplm.problems import validated
from steplm.training.metrics import SINKS
from steplm.yaml_files import dump_yaml


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
        ("growth.quite_other=3", "Known keys: operator, position, optimizer_states."),
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
    assert "or: Input should be a valid list, or 'auto' (got 'fast')" in message


def test_a_suite_is_told_from_a_run_and_a_run_from_a_suite() -> None:
    with pytest.raises(ConfigError, match="cpu is a suite of runs: `steplm compare cpu`"):
        load_config("cpu")
    with pytest.raises(ConfigError, match=r"cpu\.yaml is a suite of runs"):
        load_config(recipes_dir() / "suites" / "cpu.yaml")
    for run in ("quickstart", recipes_dir() / "quickstart.yaml"):
        with pytest.raises(ConfigError, match="is a run, not a suite"):
            read_suite(run)


@pytest.mark.parametrize("key", ["0", "null", "no"])
def test_a_key_that_is_no_text_is_named(tmp_path: Path, key: str) -> None:
    (tmp_path / "run.yaml").write_text(f"model:\n  {key}: 1\n")
    with pytest.raises(ConfigError, match="is not text: quote it"):
        load_config(tmp_path / "run.yaml")


def test_embeddings_that_nothing_would_train_are_refused() -> None:
    relora = ["plan.num_stages=1", "method=relora", "pet.restarts=1", "plan.train_embeddings=first_stage"]
    with pytest.raises(ConfigError, match="freezes embeddings and head once they are trained"):
        plan(load_config({}, relora))
    plan(load_config({}, [*relora, "pet.warm_start=0.25"]))


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
    assert [config.learning_rate(stage) for stage in (1, 2)] == [1e-3, 2e-3]


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
        (RunConfig, "method", {*METHODS}),
        (OptimConfig, "name", {*MAKERS}),
        (OptimConfig, "old_layers", {*MAKERS}),
        (PetConfig, "rule", {*MAKERS}),
        (MemoryConfig, "master_weights", {*MAKERS, "8bit"}),
        (GrowthConfig, "operator", {*OPERATORS}),
        (GrowthConfig, "position", {*POSITIONS}),
        (OptimConfig, "lr_scheduler_type", {*SCHEDULES}),
        (PetConfig, "method", {*ADAPTERS, "none"}),
        (LogConfig, "report_to", {*SINKS}),
    ],
)
def test_the_choices_of_a_key_are_the_names_that_are_implemented(
    section: type[Section], key: str, names: set[str]
) -> None:
    assert choices(section.model_fields[key].annotation) == names


def test_every_update_rule_is_priced_and_implemented() -> None:
    assert RULES.keys() == MAKERS.keys()


def test_method_auto_is_muon_in_8_bits_in_one_stage() -> None:
    config = load_config("llama_368m", ["method=auto"])
    assert (config.method, config.plan.num_stages, config.optim.name) == ("vanilla", 1, "muon")
    assert (config.memory.optimizer_states, config.memory.master_weights) == ("8bit", False)
    assert config == load_config(yaml.safe_load(dump_config(config)))


def test_methods_that_do_not_grow_have_one_stage_unless_the_run_says_otherwise() -> None:
    assert {name for name, method in METHODS.items() if not method.grows} == {*ONE_STAGE_METHODS}
    for name in ONE_STAGE_METHODS:
        assert load_config({}, [f"method={name}"]).plan.num_stages == 1
        assert load_config({}, [f"method={name}", "plan.num_stages=2"]).plan.num_stages == 2
    assert load_config({}, ["method=growth"]).plan.num_stages == 2


def test_method_auto_leaves_the_rules_and_formats_that_are_given() -> None:
    given = ["method=auto", "optim.name=adamw", "memory.master_weights=8bit"]
    config = load_config({}, given)
    assert (config.optim.name, config.memory.master_weights) == ("adamw", "8bit")
    assert config.memory.optimizer_states == "8bit"
    assert load_config({}, ["method=auto", "train.precision=fp32"]).memory.master_weights is True


def test_a_number_without_a_point_is_a_number_in_free_form_keys_too() -> None:
    assert load_config({}, ["model.extra={rms_norm_eps: 1e-5}"]).model.extra == {"rms_norm_eps": 1e-5}


# Pairs of keys that cannot go together: the overrides, both keys as the error names them, and a way out.
CLASHES = {
    "a fused update cannot sum micro-batches": (
        ["memory.fused_backward=true", "optim.max_grad_norm=null", "train.gradient_accumulation_steps=4"],
        ["memory.fused_backward", "a step has 4", "train.gradient_accumulation_steps"],
        "train.gradient_accumulation_steps=1",
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
        ["plan.train_embeddings=adapters", "adapters on frozen layers"],
        "method=step",
    ),
}


@pytest.mark.parametrize("name", CLASHES)
def test_options_that_clash_are_refused_by_both_names_with_a_way_out_that_works(name: str) -> None:
    overrides, keys, way_out = CLASHES[name]
    with pytest.raises(ConfigError) as caught:
        plan(load_config({}, overrides))
    message = str(caught.value)
    assert "\n" not in message, "one problem, not several"
    assert all(key in message for key in keys)
    assert "set " in message or "leave " in message
    plan(load_config({}, [*overrides, way_out]))


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
    plan(load_config({}, [override]))
    with pytest.raises(ConfigError, match="is for frozen layers, and growth freezes none") as caught:
        plan(load_config({}, [override, "method=growth"]))
    assert override.partition("=")[0] in str(caught.value)


# --- keys of earlier versions ---

OLD_SPELLINGS = {
    "plan.freeze_old_layers=false": "method=growth",
    "plan.freeze_old_layers=true": "method=step",
    "pet.layers=all": "method=lora, or method=relora with pet.restarts",
    "pet.layers=old": "leave it out",
    "optim.name=badam": "method=badam",
    "optim.low_rank_layers=old": "method=thawed, with optim.old_layers",
    "optim.low_rank_layers=all": "leave it out",
}


@pytest.mark.parametrize("override", OLD_SPELLINGS)
def test_an_old_key_is_refused_with_its_new_spelling(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, [override])
    assert str(caught.value).startswith(f"{override} is now ")
    assert OLD_SPELLINGS[override] in str(caught.value)


def test_every_old_key_is_known_and_several_are_told_at_once(tmp_path: Path) -> None:
    told = {(*override.partition("=")[0].split("."), override.partition("=")[2]) for override in OLD_SPELLINGS}
    assert told == {(*key, str(value).lower()) for key, values in RENAMED.items() for value in values}
    (tmp_path / "run.yaml").write_text("plan: {freeze_old_layers: false}\noptim: {name: badam}\n")
    with pytest.raises(ConfigError, match=r"is now method=growth.*is now method=badam"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("plan.freeze_old_layers=7", "plan has no key 'freeze_old_layers'"),
        ("pet.layers=[1]", "pet has no key 'layers'"),
        ("optim.name=adamm", "optim.name"),
    ],
)
def test_a_value_that_an_old_key_never_had_is_refused_as_any_mistake(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, [override])
    assert words in str(caught.value)


def written_before(**changes: Any) -> dict[str, Any]:
    """``config.yaml`` as the last version before schedules wrote it: every key, in the old spelling."""
    values = json.loads(RunConfig().model_dump_json())
    del values["method"], values["optim"]["old_layers"], values["pet"]["rule"]
    values["plan"]["freeze_old_layers"] = True
    values["pet"]["layers"] = "old"
    values["optim"]["low_rank_layers"] = "all"
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return values


ONE_STAGE = {"plan__num_stages": 1}
TRANSLATED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "step": ({"plan__num_stages": 3, "pet__rank": 64}, ["plan.num_stages=3", "pet.rank=64"]),
    "no adapters": ({"pet__method": "none"}, ["pet.method=none"]),
    "growth": ({"plan__freeze_old_layers": False}, ["method=growth"]),
    "vanilla": (ONE_STAGE, ["method=vanilla", "plan.num_stages=1"]),
    "vanilla, of which no stage has frozen embeddings": (
        {**ONE_STAGE, "plan__train_embeddings": "first_stage"},
        ["method=vanilla", "plan.num_stages=1"],
    ),
    "vanilla under galore": (
        {**ONE_STAGE, "optim__name": "galore", "optim__rank": 64},
        ["method=vanilla", "plan.num_stages=1", "optim.name=galore", "optim.rank=64"],
    ),
    "lora": ({**ONE_STAGE, "pet__layers": "all"}, ["method=lora", "plan.num_stages=1"]),
    "relora": (
        {**ONE_STAGE, "pet__layers": "all", "pet__restarts": 3, "pet__warm_start": 0.25},
        ["method=relora", "plan.num_stages=1", "pet.restarts=3", "pet.warm_start=0.25"],
    ),
    "badam": (
        {**ONE_STAGE, "optim__name": "badam", "optim__switch_steps": 50},
        ["method=badam", "plan.num_stages=1", "optim.switch_steps=50"],
    ),
    "thawed": (
        {
            "plan__freeze_old_layers": False, "optim__name": "apollo_mini", "optim__low_rank_layers": "old",
            "memory__master_weights": "adamw",
        },
        ["method=thawed", "optim.old_layers=apollo_mini", "memory.master_weights=adamw"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSLATED)
def test_the_configuration_of_an_old_run_is_read_as_its_new_spelling(tmp_path: Path, name: str) -> None:
    changes, overrides = TRANSLATED[name]
    old = written_before(**changes)
    before = json.dumps(old)
    (tmp_path / "config.yaml").write_text(dump_yaml(old))
    read = load_written_config(tmp_path / "config.yaml")
    assert read == load_config({}, [*overrides, f"optim.learning_rate={old['optim']['learning_rate']}"])
    plan(read)
    assert json.dumps(old) == before, "what was given stays as it is"


def test_a_configuration_of_today_is_translated_to_itself() -> None:
    for overrides in ([], ["method=thawed", "optim.old_layers=scale"], ["method=badam", "plan.num_stages=1"]):
        values = json.loads(load_config({}, overrides).model_dump_json())
        assert translate_old_keys(values) == values


GEMMA = {
    "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500,
}  # fmt: skip


def test_a_hugging_face_configuration_ties_the_head_as_its_family_does_where_it_does_not_say(tmp_path: Path) -> None:
    for given, tied in (({}, True), ({"tie_word_embeddings": False}, False)):
        (tmp_path / "config.json").write_text(json.dumps({**GEMMA, **given}))
        assert shape_from_hf_config(load_config(tmp_path).model.hf_config()).tie_word_embeddings is tied


@pytest.mark.parametrize("model_type", ["gemma2", "mistral", "smollm3", "olmo2", "starcoder2"])
def test_a_hugging_face_configuration_has_the_key_value_heads_of_its_family_where_it_does_not_say(
    tmp_path: Path, model_type: str
) -> None:
    values = {**GEMMA, "model_type": model_type, "num_attention_heads": 8, "pad_token_id": None}
    del values["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps({**values, "auto_map": {}, "_commit_hash": "1"}))
    expected = meta_model(AutoConfig.from_pretrained(tmp_path)).num_parameters()
    assert shape_of(load_config(tmp_path).model.hf_config()).num_parameters() == expected
    assert load_config(tmp_path, ["model.num_key_value_heads=2"]).model.hf_config()["num_key_value_heads"] == 2


def test_a_hugging_face_configuration_may_have_keys_that_its_family_does_not_read(tmp_path: Path) -> None:
    """Published ones do: Pythia's rotary_emb_base, StarCoder2's mlp_type; in a YAML they are mistakes."""
    values = {**GEMMA, "model_type": "starcoder2", "mlp_type": "default", "quantization_config": {"quant_method": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    read = load_config(tmp_path).model.hf_config()
    expected = meta_model(AutoConfig.for_model(**{**GEMMA, "model_type": "starcoder2"})).num_parameters()
    assert shape_of(read).num_parameters() == expected
    with pytest.raises(ConfigError, match="'starcoder2' has no key 'mlp_type'"):
        hf_config({**GEMMA, "model_type": "starcoder2", "mlp_type": "default"})


@pytest.mark.parametrize(
    ("keys", "rate"),
    [
        (["method=vanilla"], 1.4e-3),  # 0.7 / 512
        (["method=vanilla", "model.hidden_size=1024"], 6.8e-4),
        (["method=auto"], 3.5e-3),  # 0.079 / √512
        (["optim.name=muon", "plan.num_stages=1"], 3.5e-3),
        (["optim.name=scale", "plan.num_stages=1"], 1.4e-3),
        (["optim.name=galore", "method=relora"], 2.3e-3),
        (["plan.num_stages=3"], 6.8e-4),  # half of 0.7 / 512
        (["method=growth", "optim.name=muon"], 1.7e-3),
        (["method=badam"], 6.8e-4),
        (["method=auto", "optim.learning_rate=auto"], 3.5e-3),
        (["method=auto", "optim.learning_rate=0.01"], 0.01),
        (["optim.learning_rate=[0.01, 0.02]"], [0.01, 0.02]),
    ],
)
def test_the_default_learning_rate_follows_rule_width_and_method(keys: list[str], rate: float | list[float]) -> None:
    config = load_config({"model": {"hidden_size": 512}}, keys)
    assert config.optim.learning_rate == rate
    assert load_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "opt", "falcon", "bloom", "mpt", "gptj", "codegen"])
def test_a_hugging_face_configuration_may_name_its_sizes_otherwise(tmp_path: Path, model_type: str) -> None:
    """GPT-2's ``n_embd``, for example, and no feed-forward size."""
    config = AutoConfig.for_model(model_type)
    config.num_hidden_layers = 3
    if model_type == "gpt_neo":  # lists the kinds of its layers
        config.attention_types, config.attention_layers = [[["global"], 3]], ["global"] * 3
    config.save_pretrained(tmp_path)
    read = load_config(tmp_path).model
    assert read.num_hidden_layers == 3
    assert shape_of(read.hf_config()).num_parameters() == meta_model(config).num_parameters()


def test_a_hugging_face_configuration_without_its_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in GEMMA.items() if k != "num_attention_heads"}))
    with pytest.raises(ConfigError, match=r"config\.json has no num_attention_heads\. Write a YAML"):
        load_config(tmp_path)


def test_a_folder_that_is_no_model_is_refused_as_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the folder .* has no config\.json"):
        load_config(tmp_path)
