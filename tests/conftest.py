"""What the tests share: a tiny corpus, prepared once, and a configuration of a run that takes seconds."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

# One thread, whatever the environment says: tests that fork would hang in the threads that the fork leaves behind.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from steplm.cli.app import main
from steplm.config import RunConfig, load_config

VOCAB_SIZE = 300
# Where the runs of tests train. On a GPU some fail that ask for the same bits twice, or for a peak without workspaces.
TEST_DEVICE = os.environ.get("STEPLM_TEST_DEVICE", "cpu")
# Properties are tried on the same examples at every run; on others with STEPLM_RANDOM=1.
settings.register_profile("steplm", derandomize=not os.environ.get("STEPLM_RANDOM"))
settings.load_profile("steplm")

WORDS = ("the", "model", "grows", "new", "layers", "between", "old", "ones", "while", "memory", "stays", "small")


def pytest_collection_finish() -> None:
    """Spare the collections that runs ask for the 400,000 objects of imported modules: half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real text and evaluation sets; tests that use it are skipped where it is absent."""
    path = Path(os.environ.get("STEPLM_DATA", "../shared/data"))
    if not path.is_dir():
        pytest.skip(f"no shared data in {path} (set STEPLM_DATA)")
    return path.resolve()  # commands are started elsewhere


@pytest.fixture
def hub_gives(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], list[tuple[Any, Any]]]:
    """``hub_gives(records)``: ``datasets.load_dataset`` gives these. The list of its calls is returned."""
    datasets = pytest.importorskip("datasets")

    def give(records: list[Any]) -> list[tuple[Any, Any]]:
        calls = []

        def load_dataset(*args: object, **kwargs: object) -> list[Any]:
            calls.append((args, kwargs))
            return records

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return give


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 200 short documents with some regularity to learn."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    with path.open("w") as stream:
        for number in range(200):
            text = f"{number}: " + " ".join(generator.choices(WORDS, k=generator.randint(10, 60)))
            stream.write(json.dumps({"text": text}) + "\n")
    return path.resolve()  # commands are started elsewhere


@pytest.fixture(scope="session")
def tiny_run(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """``tiny_run(output_dir, *overrides)``: a run of two stages on the tiny corpus, prepared once a session."""
    prepared = tmp_path_factory.mktemp("prepared")

    def configure(output_dir: Path, *overrides: str) -> RunConfig:
        values = {
            "name": "tiny",
            "output_dir": str(output_dir),
            "model": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": VOCAB_SIZE,
                "max_position_embeddings": 64,
            },
            "data": {
                "train": [str(tiny_corpus)],
                "validation_fraction": 0.1,
                "prepared_dir": str(prepared),
                "num_workers": 1,
            },
            "plan": {"num_stages": 2, "total_tokens": 16 * 64},
            "pet": {"rank": 4},
            "optim": {"learning_rate": 1e-2},
            "train": {
                "precision": "fp32",
                "device": TEST_DEVICE,
                "sequence_length": 16,
                "per_device_train_batch_size": 4,
                "loss_chunk_size": 32,
                "save_steps": 4,
            },
            "eval": {"eval_steps": 4, "max_tokens": 128},
            "log": {"progress": "none", "logging_steps": 1},
        }
        return load_config(values, overrides)

    return configure


@pytest.fixture(scope="session")
def trained(tiny_run: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``trained(*overrides)``: the directory of a finished run, trained once for all tests that only read it."""

    @functools.cache
    def run_dir(*overrides: str) -> Path:
        from steplm.training.run import train

        path = tmp_path_factory.mktemp("trained")
        assert train(tiny_run(path, *overrides)).finished
        return path

    return run_dir


@pytest.fixture(scope="session")
def save_tiny_model() -> Callable[..., Path]:
    """``save_tiny_model(folder, tokenizer, **config)``: a Hugging Face folder of two random layers, far from uniform:
    a wrong context or a wrong label shows."""

    def save(folder: Path, tokenizer: Any, *, seed: int = 0, dtype: str = "float32", **config: Any) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.5,
        }
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**shape | config)).to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def stub_judge() -> Iterator[Callable[..., Any]]:
    """``stub_judge(faults=…, key=…)``: a running judge on loopback, see ``tests/mt_bench/stub_judge.py``."""
    file = Path(__file__).parent / "mt_bench/stub_judge.py"
    spec = importlib.util.spec_from_file_location("stub_judge", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.ExitStack() as running:
        yield lambda *arguments, **options: running.enter_context(module.StubJudge(*arguments, **options))


@pytest.fixture
def largest_file() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """``with largest_file(1000):`` a file that would grow beyond so many bytes is refused, as a full disk does."""
    resource = pytest.importorskip("resource", reason="needs POSIX")

    @contextlib.contextmanager
    def limited(num_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def steplm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The entry point, called in this process: a process of its own spends seconds on imports."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object, cwd: Path) -> Result:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["steplm", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capfd.readouterr())

    return run
