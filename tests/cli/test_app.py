"""The command as a person uses it: exit codes, messages without tracebacks, quick help."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from steplm.cli import main
from steplm.cli.init import starter_text
from steplm.config import RunConfig, config_keys, dump_config, load_config
from steplm.models.build import hf_config, initial_state
from steplm.models.folder import save_folder

Configure = Callable[..., RunConfig]
Run = Callable[..., Any]


def test_help_names_every_verb_in_under_a_third_of_a_second(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "steplm", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "120"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    verbs = "plan fit prepare train grow export eval generate init schema quickstart"
    for verb in verbs.split():
        assert f" {verb} " in result.stdout
    # Processor time, not the clock: other work on the machine must not fail the test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "quickstart", "plan.num_stage=3"], 2, "Did you mean 'num_stages'?"),
        (["plan", "quickstart", "plan.num_stages=9"], 2, "plan.num_stages=9 is more than model.num_hidden_layers=8"),
        (["plan", "quickstart", "pet.rank=4096"], 2, "4096"),
        (["plan", "nowhere.yaml"], 2, "no file 'nowhere.yaml'"),
        (["plan"], 2, "Missing argument"),
        (["train", "quickstart", "train.device=tpu"], 2, "train.device"),
        (["export", "nowhere"], 1, "no complete checkpoint"),
        (["grow", "./nowhere", "--to", "8", "-o", "out"], 1, "no folder"),
        (["generate", "./nowhere", "hello"], 1, "no folder"),
        (["eval", "./nowhere", "--data", "x.txt"], 1, "no folder"),
        (["train", "quickstart", "data.train=absent-*.jsonl"], 1, "absent-*.jsonl"),
        (["prepare", "quickstart", "data.train=[]"], 2, "data.train is empty"),
        (["grow", "./nowhere", "--to", "8", "-o", "out", "--operator", "stck"], 2, "Did you mean 'stack'?"),
        (["grow", "./nowhere", "--to", "8", "-o", "out", "--operator", "stack", "--position", "upper"], 2, "together"),
        (["init", "absent/run.yaml"], 1, "error: No such file or directory: absent/run.yaml"),
        (["plan", "quickstart", "plan.budget=1MiB"], 1, "memory.reserve=1.25 GiB is part of it: raise the budget"),
    ],
)
def test_bad_input_gets_one_message_and_an_exit_code(
    steplm: Run, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    result = steplm(*arguments, cwd=tmp_path)
    assert result.returncode == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_is_broken_between_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["steplm", "plan", "llama_1.2b", "--budget", "16GiB"])
    monkeypatch.setenv("COLUMNS", "72")

    def error(is_terminal: bool) -> list[str]:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().err.splitlines()

    piped, shown = error(False), error(True)
    assert " ".join(" ".join(shown).split()) == " ".join(" ".join(piped).split())
    assert len(piped) == piped.index("These fit, the cheapest first:") + 4
    assert max(map(len, piped)) > 200
    assert max(map(len, shown)) <= 72
    assert all(line.startswith("  ") for line in shown[shown.index("These fit, the cheapest first:") + 1 :])


def test_the_hub_out_of_reach_is_said_so(steplm: Run, tmp_path: Path) -> None:
    result = steplm("prepare", "llama_368m", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("HubUnavailable: ")
    assert "Traceback" not in result.stderr


def test_init_writes_a_file_that_names_every_key_and_can_be_planned(steplm: Run, tmp_path: Path) -> None:
    assert steplm("init", cwd=tmp_path).returncode == 0
    text = (tmp_path / "run.yaml").read_text()
    assert text == starter_text()
    assert load_config(tmp_path / "run.yaml").name == "my-run"
    uncommented = yaml.safe_load(
        "\n".join(line.replace("# ", "", 1) if line.startswith(("# ", "  # ")) and ":" in line else line
                  for line in text.splitlines() if not line.startswith("# "))
    )  # fmt: skip
    named = {f"{section}.{key}" for section, keys in uncommented.items() if isinstance(keys, dict) for key in keys}
    assert {key for key in config_keys() if "." in key} <= named
    assert "choices: interpolation, interpolation_mean, stack, identity, random" in text
    assert max(map(len, text.splitlines())) <= 120
    assert steplm("plan", "run.yaml", cwd=tmp_path).returncode == 0
    again = steplm("init", cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_a_run_by_command_from_yaml_to_text(steplm: Run, tiny_run: Configure, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(tiny_run(Path("out"), "log.progress=auto")))
    trained = steplm("train", "run.yaml", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "stage 2/2  step" in trained.stdout
    assert "growth  2 -> 4 layers" in trained.stdout or "growth  3 -> 4 layers" in trained.stdout
    assert "differs" not in trained.stdout
    exported = steplm("export", "out", "-o", "model", cwd=tmp_path)
    assert exported.stdout.strip() == "model"
    generated = steplm("generate", "model", "the model", "--max-new-tokens", "5", cwd=tmp_path)
    assert generated.returncode == 0
    assert "the model" in generated.stdout
    evaluated = steplm("eval", "model", "--data", "run.yaml.txt", "--json", cwd=tmp_path)
    assert evaluated.returncode == 1
    (tmp_path / "run.yaml.txt").write_text("the model grows new layers " * 50)
    evaluated = steplm("eval", "model", "--data", "run.yaml.txt", "--json", cwd=tmp_path)
    assert json.loads(evaluated.stdout)[0]["perplexity"] > 1
    finished = steplm("train", "run.yaml", cwd=tmp_path)
    assert finished.returncode == 0
    assert "finished already" in finished.stdout


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox"])
def test_grow_deepens_any_decoder_folder(steplm: Run, tmp_path: Path, model_type: str) -> None:
    values = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    }
    config = hf_config(values)
    save_folder(tmp_path / "small", config, initial_state(config, seed=0, dtype=torch.bfloat16))
    result = steplm("grow", "small", "--to", "5", "--operator", "identity", "-o", "deep", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("new") == 2
    small, deep = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("small", "deep"))
    assert deep.config.num_hidden_layers == 5
    assert deep.dtype == torch.bfloat16
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(small(tokens).logits, deep(tokens).logits)
    (tmp_path / "run").mkdir()
    (tmp_path / "small").rename(tmp_path / "run/export")
    shallow = steplm("grow", "run", "--to", "2", "-o", "shallow", cwd=tmp_path)
    assert shallow.returncode == 1
    assert "has 3 already" in shallow.stderr


def test_prepared_shards_are_verified_when_asked(steplm: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {n} of some words"}}\n' for n in range(60)))
    prepare = ("prepare", "quickstart", "data.train=a.jsonl", "model.vocab_size=300", "data.prepared_dir=p", "--verify")
    prepare += ("data.validation_fraction=0.2", "log.progress=none")
    first = steplm(*prepare, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    shard = tmp_path / "p" / "train" / "shard-00000.bin"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    damaged = steplm(*prepare, cwd=tmp_path)
    assert damaged.returncode == 1
    assert "shard-00000.bin is not what was written" in damaged.stderr


def test_the_schema_is_json(steplm: Run, tmp_path: Path) -> None:
    assert json.loads(steplm("schema", cwd=tmp_path).stdout)["title"] == "RunConfig"
