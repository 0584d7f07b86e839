"""``run.yaml`` and ``suite.yaml``: any bytes, and configurations in which values are others than they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from steplm.compare.check import check_plans
from steplm.compare.entries import Suite
from steplm.compare.suite import read_suite
from steplm.config import RunConfig, dump_config, load_config
from steplm.errors import ConfigError
from steplm.models.shape import shape_of
from steplm.planner.plan import plan

fuzz = settings.get_profile("fuzz")
Claim = Callable[..., AbstractContextManager[None]]
Fresh = Callable[[], AbstractContextManager[Path]]
Spoil = Callable[[st.DataObject, Any], Any]

SMALL = {
    "name": "small",
    "model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "extra": {"rope_theta": 1e4, "head_dim": 8, "attention_bias": True},
    },
    "data": {"train": ["text.jsonl"]},
    "plan": {"num_stages": 2, "total_tokens": "64k"},
    "pet": {"rank": 4},
    "train": {"sequence_length": 16, "per_device_train_batch_size": 2},
}
ALL_KEYS = {**RunConfig().model_dump(mode="json"), **SMALL}
SUITE = {
    "name": "small",
    "run": SMALL,
    "baseline": "vanilla",
    "seeds": [0, 1],
    "tune": {"learning_rates": [0.001, 0.002], "extend": 1, "refine": 1},
    "evaluate": {"held_out": {"data": ["other.txt"], "max_tokens": "1k"}},
    "entries": [
        {"name": "vanilla", "method": "vanilla"},
        {"name": "step", "method": "step", "set": {"plan.num_stages": 2}, "label": "STEP"},
        {"name": "rank", "like": "step", "vary": {"pet.rank": [2, 4]}},
    ],
    "questions": [{"title": "All of them", "entries": ["vanilla", "rank=*"], "text": "Which?"}],
}
# Text of no document that the strategies below would find, each a known way to trouble.
YAML_TRAPS = [
    "a: &a [*a]",
    "model: &m {extra: *m}",
    "x: &x [1,1]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}' if i else '*x'] * 9)}]\n" for i in range(12)),
    "!!python/object/apply:os.system ['true']",
    "seed: !!python/object/new:os.system [true]",
    "seed: !!binary aGVsbG8=",
    "model: !!set {a, b}",
    "seed: 2001-99-99",
    "seed: 1" + "0" * 5000,
    "seed: 0x" + "f" * 5000,
    "seed: 1:99:99:99",
    "seed: !!int x",
    "seed: !!float x",
    "? [a, b]\n: 1",
    "? {a: b}\n: 1",
    "1: 2\n'a b': 3\nnull: 4\n",
    "a b: 1",
    "<<: 1",
    "<<: [{seed: 1}, {seed: 2}]",
    "--- 1\n--- 2\n",
    "name: ..\n",
    "model: {'': 1, 'a.b': 2}",
    "\ufeffseed: 1",
    "name: ${HOME}/${UNSET:-x}",
    "seed: '${UNSET_VARIABLE}'",
    "name: '1e5'",
    "data: {text_field: 'y', tokenizer: '1e-5'}",
    'data: {text_field: "a\\x85b"}',
    "model: {extra: {a: .inf, b: -.inf}}",
    "model: {extra: {a: .nan}}",
    "model: {extra: {model_type: 5}}",
    "model: {extra: {model_type: [[1]]}}",
    f"name: x\nbaseline: a\nentries: [{{name: a, method: vanilla}}]\nrun: {'x' * 5000}",
    "model: {extra: {num_hidden_layers: 3, vocab_size: []}}",
    "train: {sequence_length: .inf}",
    "plan: {total_tokens: 1e999}",
    "plan: {total_tokens: [1]}",
    "plan: {tokens_per_parameter: .inf}",
    "optim: {learning_rate: .nan}",
    "memory: {correction: .inf}",
]


def is_small(config: RunConfig) -> bool:
    """Whether a plan takes milliseconds: work grows with the square of the depth."""
    values = config.model.hf_config()
    numbers = [value for value in values.values() if isinstance(value, int)]
    depth = values.get("num_hidden_layers", 1)
    return not isinstance(depth, int) or (depth <= 32 and max(numbers) <= 2**40)


def read_and_plan(path: Path, overrides: tuple[str, ...] = ()) -> None:
    config = load_config(path, overrides)
    written = path.with_name("written.yaml")
    written.write_text(dump_config(config), encoding="utf-8")
    assert load_config(written) == config, "what is written is read back"
    if is_small(config):
        plan(config, shape_of(config.model.hf_config()))


@pytest.mark.parametrize("text", YAML_TRAPS)
def test_a_yaml_trap_ends_in_success_or_one_error(text: str, claim: Claim, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    for read in (read_and_plan, read_suite):
        with claim(tmp_path):
            read(path)


@fuzz
@given(content=st.one_of(st.binary(), st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes_as_a_run_and_as_a_suite(content: bytes, claim: Claim, fresh_folder: Fresh) -> None:
    with fresh_folder() as folder:
        (folder / "any.yaml").write_bytes(content)
        for read in (read_and_plan, read_suite):
            with claim(folder):
                read(folder / "any.yaml")


@fuzz
@given(data=st.data())
def test_a_spoiled_run_is_planned_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, spoil_json: Spoil
) -> None:
    values = spoil_json(data, data.draw(st.sampled_from([SMALL, ALL_KEYS]), label="configuration"))
    with fresh_folder() as folder:
        (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        with claim(folder):
            read_and_plan(folder / "run.yaml")


@fuzz
@given(data=st.data())
def test_spoiled_bytes_of_a_run_are_planned_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, spoil_bytes: Spoil
) -> None:
    values = data.draw(st.sampled_from([SMALL, ALL_KEYS]), label="configuration")
    with fresh_folder() as folder:
        (folder / "run.yaml").write_bytes(spoil_bytes(data, yaml.safe_dump(values).encode()))
        with claim(folder):
            read_and_plan(folder / "run.yaml")


@fuzz
@given(data=st.data())
def test_any_override_is_taken_or_refused(data: st.DataObject, claim: Claim, fresh_folder: Fresh) -> None:
    keys = st.one_of(st.sampled_from([f"{s}.{k}" for s, v in ALL_KEYS.items() if isinstance(v, dict) for k in v]))
    key = data.draw(st.one_of(keys, st.text(max_size=8)), label="key")
    value = data.draw(st.one_of(st.sampled_from(YAML_TRAPS), st.text(max_size=12)), label="value")
    with fresh_folder() as folder:
        (folder / "run.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
        with claim(folder):
            read_and_plan(folder / "run.yaml", (f"{key}={value}",))


FAMILIES = (
    "llama", "phi3", "gemma3_text", "starcoder2", "stablelm", "cohere", "gpt_neox", "mixtral", "qwen2_moe", "mamba",
    "bert", "clip",
)  # fmt: skip


@fuzz
@given(data=st.data())
def test_models_of_any_family_with_spoiled_keys_are_planned_or_refused(
    data: st.DataObject, claim: Claim, spoil_json: Spoil
) -> None:
    family = data.draw(st.sampled_from(FAMILIES), label="family")
    defaults = AutoConfig.for_model(family).to_dict()
    keys = data.draw(st.lists(st.sampled_from(sorted(defaults)), min_size=1, max_size=3), label="keys")
    # As in a file: a configuration of transformers holds more than that, types among it.
    own = yaml.safe_load(json.dumps({key: defaults[key] for key in keys if key not in SMALL["model"]}, default=str))
    model = {**SMALL["model"], "model_type": family, "extra": spoil_json(data, own)}
    with claim():
        config = load_config({**SMALL, "model": model})
        if is_small(config):
            plan(config, shape_of(config.model.hf_config()))


@pytest.mark.parametrize(
    "changes",
    [
        {"tune": {"learning_rates": [0.001, 0.002], "extend": 2**40}},
        {"tune": {"learning_rates": [0.001, 0.002], "refine": 40}},
        {"entries": [{"name": "vanilla", "method": "vanilla", "vary": {f"k{i}": [*range(9)] for i in range(12)}}]},
        {"entries": [{"name": "..", "method": "vanilla"}], "baseline": ".."},
    ],
)
def test_a_suite_without_end_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Suite(read_suite({**SUITE, **changes}))


@fuzz
@given(data=st.data())
def test_a_spoiled_suite_is_planned_or_refused(
    data: st.DataObject, claim: Claim, fresh_folder: Fresh, spoil_json: Spoil
) -> None:
    values = spoil_json(data, SUITE)
    with fresh_folder() as folder:
        (folder / "suite.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        with claim():
            config = read_suite(folder / "suite.yaml")
            if is_small(load_config(config.run)):
                suite = Suite(config)
                if sum(len(list(suite.possible_runs(entry, {}))) for entry in suite.entries.values()) < 50:
                    check_plans(suite)
