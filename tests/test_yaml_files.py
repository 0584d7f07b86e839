"""YAML that would lose or change a value without a word is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from steplm.errors import ConfigError
from steplm.yaml_files import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("train: {a: 1}\nplan: {}\ntrain:\n  b: 2\n", "train", "1 and 3"),
        ("plan:\n  total_tokens: 1M\n  num_stages: 2\n  'total_tokens': 2M\n", "total_tokens", "2 and 4"),
        ("plan: {num_stages: 2, num_stages: 3}\n", "num_stages", "1 and 1"),
        ("entries:\n- name: a\n  keys: {}\n  name: b\n", "name", "2 and 4"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path, text: str, key: str, lines: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=rf"run\.yaml is not valid YAML: the key '{key}' appears twice, in lines {lines}$"
    ):
        read_yaml(tmp_path / "run.yaml")


def test_a_merged_mapping_may_be_overridden() -> None:
    text = "outer:\n  inner: &b {<<: &a {rank: 1, seed: 1}, rank: 2}\nother: {<<: *b, seed: 3}\nagain: *a\n"
    assert parse_yaml(text) == {
        "outer": {"inner": {"rank": 2, "seed": 1}},
        "other": {"rank": 2, "seed": 3},
        "again": {"rank": 1, "seed": 1},
    }


def test_the_same_key_in_two_mappings_is_fine() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 2, a: 3}") == {"a": {"x": 1}, "b": {"x": 2, "a": 3}}


def test_a_syntax_error_is_one_line_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("plan:\n  layers: [1, 2\ntrain: {}\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "run.yaml")
    assert str(caught.value).endswith("(line 3, column 6)")
    assert "\n" not in str(caught.value)


def test_a_duplicate_in_an_override_is_no_value() -> None:
    with pytest.raises(yaml.YAMLError, match="'a' appears twice"):
        parse_yaml("{a: 1, a: 2}")
