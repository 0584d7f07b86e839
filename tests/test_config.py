from __future__ import annotations

from pathlib import Path

import pytest

from steplm.config import RunConfig, config_keys, config_schema, dump_config, load_config, recipes_dir
from steplm.errors import ConfigError


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
        reference = entry.get("$ref", "").rpartition("/")[2]
        section = schema["$defs"].get(reference)
        named |= {f"{name}.{key}" for key in section["properties"]} if section else {name}
    assert named == set(config_keys())


def test_the_first_stage_has_the_first_learning_rate() -> None:
    config = RunConfig.model_validate({"optim": {"learning_rate": [1e-3, 2e-3]}})
    assert [config.learning_rate(stage) for stage in (1, 2)] == [1e-3, 2e-3]
