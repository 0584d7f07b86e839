"""An export: whole, replaceable, and silent about the machine that it was written on."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from steplm.checkpoint import CheckpointState, save_checkpoint
from steplm.checkpoint.shards import fingerprint
from steplm.config import RunConfig, dump_config, load_config
from steplm.errors import CheckpointError, ConfigError, WriteError
from steplm.models.build import hf_config, initial_state
from steplm.planner.plan import plan as make_plan
from steplm.training.export import export
from steplm.types import LayerProvenance, TrainState, to_json

Configure = Callable[..., RunConfig]


def _tokenizer(folder: Path, word: str = "word") -> None:
    tokenizer = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1, word: 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


@pytest.fixture
def run_dir(tiny_run: Configure, tmp_path: Path) -> Path:
    """A run directory with one checkpoint, as training leaves it, but for the training."""
    run_dir = tmp_path / "run"
    config = tiny_run(
        run_dir,
        f"data.prepared_dir={tmp_path / 'prepared'}",
        f"data.train=[{tmp_path}/texts/mine.jsonl, 'hub://owner/texts?split=train', 'builtin://python-docs']",
        f"data.tokenizer={tmp_path}/my-tokenizer",
        f"init_from={tmp_path}/my-model",
    )
    plan = make_plan(config)
    hf = hf_config(config.model.hf_config(), plan.layers[0])
    hf._name_or_path = str(tmp_path / "my-model")  # as transformers sets it where it has read a folder
    save_checkpoint(
        run_dir / "checkpoints",
        config=hf,
        weights=initial_state(hf, seed=0, dtype=torch.bfloat16),
        adapters={},
        optimizer={"lm_head.weight.master": torch.zeros(2, 2)},
        state=CheckpointState(
            progress=TrainState(1, 1, 2, 2, 128),
            schedule_hash=plan.schedule.hash_until(1),
            phase=plan.schedule.phases[0],
            data_fingerprint="0",
            provenance=tuple(LayerProvenance(1, (), None) for _ in range(plan.layers[0])),
            trained_names=(),
            optimizer_steps={},
            metrics_bytes=0,
            elapsed_seconds=1.0,
        ),
    )
    (run_dir / "config.yaml").write_text(dump_config(config))
    (run_dir / "plan.json").write_text(json.dumps(to_json(plan)))
    _tokenizer(run_dir / "tokenizer")
    return run_dir


def _word(folder: Path) -> str:
    return AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(2)


def test_the_tokenizer_is_the_runs_own_wherever_it_is_called_from(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tokenizer(tmp_path / "prepared" / "tokenizer", word="other")
    monkeypatch.chdir(tmp_path)
    folder = export(run_dir, "out")
    assert folder == Path("out")
    assert _word(folder) == "word"
    assert AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id == 0


def test_an_older_run_takes_the_tokenizer_of_its_data_and_without_any_says_so(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "tokenizer").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"no tokenizer in .*Copy the folder"):
        export(run_dir)
    assert not (run_dir / "export").exists()
    _tokenizer(tmp_path / "prepared" / "tokenizer", word="other")
    assert _word(export(run_dir)) == "other"


def test_one_checkpoint_is_exported_from_inside_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir / "checkpoints" / "stage1-step000002")
    assert (export(".") / "model.safetensors").is_file()
    assert (run_dir / "export" / "model.safetensors").is_file()


def test_an_earlier_export_is_replaced_whole(run_dir: Path) -> None:
    folder = export(run_dir)
    (folder / "stale.safetensors").touch()
    assert export(run_dir) == folder
    assert not (folder / "stale.safetensors").exists()
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".")] == []


def test_an_export_that_cannot_be_written_leaves_the_earlier_one(
    run_dir: Path, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    folder = export(run_dir)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with largest_file(10_000), pytest.raises(WriteError, match=r"cannot write .*export.*: File too large"):
        export(run_dir)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("files", [["provenance.json", "config.json", "model.safetensors"], ["plan.json"]])
def test_a_folder_that_is_no_export_is_left_alone(run_dir: Path, tmp_path: Path, files: list[str]) -> None:
    """A folder that ``steplm grow`` wrote has a provenance too, and a run directory a plan."""
    folder = tmp_path / "precious"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("mine")
    with pytest.raises(CheckpointError, match="not an earlier export"):
        export(run_dir, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    with pytest.raises(CheckpointError, match="not an earlier export"):
        export(run_dir, folder / files[0])


def test_the_current_folder_is_not_replaced(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    for here in (".", "", empty, ".."):
        with pytest.raises(CheckpointError, match="current folder"):
            export(run_dir, here)
    assert export(run_dir, "model") == Path("model")
    assert (empty / "model" / "config.json").is_file()


def test_no_file_of_an_export_tells_where_it_was_made(run_dir: Path, tmp_path: Path) -> None:
    folder = export(run_dir, tmp_path / "out")
    telling = [path.name for path in folder.iterdir() if str(tmp_path).encode() in path.read_bytes()]
    assert telling == []
    published = load_config(folder / "training_config.yaml")
    assert published.data.train == ["mine.jsonl", "hub://owner/texts?split=train", "builtin://python-docs"]
    assert (published.data.tokenizer, published.init_from) == ("my-tokenizer", "my-model")
    assert published.output_dir is None
    assert published.data.prepared_dir is None
    assert published.model == load_config(run_dir / "config.yaml").model


def test_generation_stops_where_that_of_the_given_model_does(run_dir: Path, tmp_path: Path) -> None:
    """Its answers end at a token of their own, beside the end of text of the run's tokenizer."""
    own = GenerationConfig.from_pretrained(export(run_dir))
    assert (own.eos_token_id, own.temperature) == (0, 0.8)
    (tmp_path / "my-model").mkdir()
    # Without do_sample, as some published models have it, although transformers refuses to save it.
    GenerationConfig(eos_token_id=[2, 7], temperature=0.5).to_json_file(tmp_path / "my-model/generation_config.json")
    given = GenerationConfig.from_pretrained(export(run_dir))
    assert (given.eos_token_id, given.temperature) == ([0, 2, 7], 0.5)


def test_an_export_holds_just_the_tensors_of_its_configuration(run_dir: Path) -> None:
    file = run_dir / "checkpoints/stage1-step000002/config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": ', '"num_hidden_layers": 1'))
    marker = file.with_name("COMPLETE")
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"config.json": fingerprint(file)}))
    with pytest.raises(ConfigError, match=r"the weights do not fit the model: .* missing"):
        export(run_dir)
    assert not (run_dir / "export").exists()
