"""Keys of instruction tuning: all problems at once, and none that nothing reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import steplm
from steplm.errors import ConfigError
from steplm.sft.config import SftConfig, load_sft_config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("learning_rate: 1e-4\nlora_rank: 8\n")
    config = load_sft_config(file, ["learning_rate=3e-4", "packing=true"])
    assert (config.learning_rate, config.lora_rank, config.packing, config.alpha) == (3e-4, 8, True, 16)


def test_defaults_of_the_learning_rate_follow_the_method() -> None:
    assert SftConfig().highest_learning_rate == 2e-5
    assert SftConfig(lora_rank=4).highest_learning_rate == 2e-4


def test_all_problems_are_told_at_once_with_the_nearest_key() -> None:
    with pytest.raises(ConfigError) as caught:
        load_sft_config(None, ["lora_rnk=8", "learning_rate=-1", "too_long=cut", "sequence_lengt=3"])
    message = str(caught.value)
    for words in ("4 problems", "Did you mean 'lora_rank'?", "learning_rate:", "too_long:", "'sequence_length'?"):
        assert words in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora_alpha=8"], "set lora_rank"),
        (["max_steps=3", "num_train_epochs=1"], "both set the length"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_sft_config(None, overrides)


def test_every_key_is_read_somewhere() -> None:
    folder = Path(steplm.__file__).parent / "sft"
    code = "\n".join(path.read_text() for path in folder.glob("*.py"))
    read = set(re.findall(r"(?<=config\.)\w+|(?<=self\.)\w+", code))
    assert set(SftConfig.model_fields) <= read
