"""A mixture gives each source its share of any stretch, at any place at once, and misses nothing of any source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steplm.config import RunConfig, load_config
from steplm.data.loader import BatchLoader, Prefetcher, training_loader
from steplm.data.mixture import MAX_EPOCHS, PERIOD, Mixture, epochs, repetition_warnings, whole_shares
from steplm.data.prepare import prepare
from steplm.data.tokens import Manifest, TokenDataset
from steplm.errors import ConfigError, DataError

S = 4
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.3], [7, 3]),
        ([1, 1, 2], [1, 1, 2]),
        ([0.6, 0.3, 0.1], [6, 3, 1]),
        ([5], [1]),
        ([1, 2, 3], [1667, 3333, 5000]),
        ([1, 1e-9], [9999, 1]),
    ],
)
def test_weights_become_whole_shares(weights: list[float], shares: list[int]) -> None:
    assert whole_shares(weights) == shares


@settings(max_examples=12, deadline=None)
@given(weights=WEIGHTS)
def test_every_stretch_has_each_sources_share_but_for_two_sequences(weights: list[float]) -> None:
    mixture = Mixture(weights)
    assert np.all(np.abs(mixture.counts / mixture.period - np.array(weights) / sum(weights)) <= len(weights) / PERIOD)
    sources, places = mixture.locate(np.arange(2 * mixture.period + 3))
    for source, count in enumerate(mixture.counts):
        of_source = sources == source
        ahead = np.cumsum(of_source) - count / mixture.period * np.arange(1, len(sources) + 1)
        assert np.abs(ahead).max() < 1  # Tijdeman's bound: so between any two places, less than 2
        assert places[of_source].tolist() == list(range(of_source.sum()))


def test_any_place_of_a_mixture_is_found_at_once() -> None:
    mixture = Mixture([0.7, 0.3])
    sources, places = mixture.locate(np.array([10**15, 10**15 + 1, 10**15 + 2]))
    assert sorted(sources.tolist()) == [0, 0, 1]
    assert set(places.tolist()) <= {7 * 10**14, 7 * 10**14 + 1, 3 * 10**14}


def test_the_order_of_sources_never_changes_between_versions() -> None:
    assert Mixture([0.7, 0.3]).locate(np.arange(10))[0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]


@pytest.fixture
def two(make_dataset: Callable[..., TokenDataset]) -> list[TokenDataset]:
    """Two data sets of different tokens, each unique."""
    return [
        make_dataset([[start + number for number in range(5 * place, 5 * place + 5)] for place in range(size)])
        for start, size in ((1000, 20), (3000, 7))
    ]


def test_a_mixture_is_the_batches_of_its_sources_interleaved(two: list[TokenDataset]) -> None:
    mixed = BatchLoader(two, weights=[3, 1], seed=5, sequence_length=S)
    batch = mixed.batch(8 * S, 40)
    assert batch.source_ids.tolist().count(0) == 30
    for index, (dataset, place, number) in enumerate(zip(two, (6, 2), (30, 10), strict=True)):
        alone = BatchLoader(dataset, seed=5, sequence_length=S).batch(place * S, number)
        mine = batch.source_ids == index
        assert torch.equal(batch.input_ids[mine], alone.input_ids)
        assert torch.equal(batch.labels[mine], alone.labels)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_mixed_batch_is_the_same_over_ranks_and_in_the_background(two: list[TokenDataset], world_size: int) -> None:
    mixed = BatchLoader(two, weights=[0.55, 0.45], seed=5, sequence_length=S)
    whole = mixed.batch(6 * S, 12)
    parts = [Prefetcher(mixed, 12, rank, world_size).batch(6 * S) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.source_ids for part in parts]), whole.source_ids)
    micro_batches = list(whole.split(5))
    assert torch.equal(torch.cat([part.source_ids for part in micro_batches]), whole.source_ids)


# From a run's configuration.


@pytest.fixture
def mixed_run(configure: Callable[..., RunConfig], jsonl: Callable[..., Path], texts: list[str]) -> RunConfig:
    return configure(
        train=[
            {"name": "web", "files": str(jsonl(texts[:40], "web.jsonl")), "weight": 0.75},
            {"name": "code", "files": [str(jsonl(texts[35:], "code.jsonl"))], "weight": 0.25},
        ]
    )


def test_each_source_is_prepared_on_its_own_and_no_text_twice(mixed_run: RunConfig, texts: list[str]) -> None:
    manifest = prepare(mixed_run)
    assert manifest.splits_of("train") == {"web": "train/web", "code": "train/code"}
    assert manifest.splits_of("validation") == {"validation": "validation"}
    assert manifest.num_duplicates == 5
    assert sum(split.num_documents for split in manifest.splits.values()) == len(texts)
    assert (mixed_run.prepared_dir / "train" / "code" / "shard-00000.bin").is_file()
    assert prepare(mixed_run) == manifest == Manifest.load(mixed_run.prepared_dir)


def test_a_run_trains_on_its_mixture_and_other_weights_need_no_other_shards(mixed_run: RunConfig) -> None:
    manifest = prepare(mixed_run)
    sequence_length = mixed_run.train.sequence_length
    values = mixed_run.model_dump(mode="json")
    values["train"]["sequence_length"] = sequence_length = 16
    values["data"]["train"][0]["weight"] = 0.25
    even = load_config(values)
    assert prepare(even) == manifest
    assert training_loader(even).batch(0, 8).source_ids.sum() == 4
    values["data"]["train"][0]["weight"] = 0.75
    loader = training_loader(load_config(values))
    assert loader.batch(16 * sequence_length, 16).source_ids.sum() == 4
    # A list of text has no sources.
    values["data"]["train"] = values["data"]["train"][0]["files"]
    values["data"]["prepared_dir"] += "_plain"
    prepare(load_config(values))
    assert training_loader(load_config(values)).batch(0, 8).source_ids is None


def test_epochs_of_each_source_follow_from_its_weight_and_its_tokens(mixed_run: RunConfig) -> None:
    manifest = prepare(mixed_run)
    counted = epochs(manifest, mixed_run.data.weights, 100_000)
    for name, share in (("web", 0.75), ("code", 0.25)):
        assert counted[name] == pytest.approx(100_000 * share / manifest.split(f"train/{name}").num_tokens)
    assert repetition_warnings({"web": MAX_EPOCHS, "code": 4.04}) == [
        "code is repeated 4.0 times; beyond 4 epochs repeated tokens teach little. Lower its weight, or add text"
    ]


def test_a_mixture_of_sources_of_which_one_is_empty_names_it(
    configure: Callable[..., RunConfig], jsonl: Callable[..., Path], texts: list[str]
) -> None:
    sources = [
        {"name": "web", "files": str(jsonl(texts, "web.jsonl")), "weight": 1},
        {"name": "copy", "files": str(jsonl(texts, "copy.jsonl")), "weight": 1},
    ]
    with pytest.raises(DataError, match="no training text in copy: "):
        prepare(configure(train=sources))
    with pytest.raises(ConfigError, match=r"data\.max_train_tokens limits one list of text"):
        prepare(configure(train=sources, max_train_tokens=100))


def test_validation_sets_have_names_and_are_kept_out_of_training(
    configure: Callable[..., RunConfig], jsonl: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    sets = {"web": str(jsonl(texts[:5], "v1.jsonl")), "code": [str(jsonl(texts[5:8], "v2.jsonl"))]}
    config = configure(train=str(jsonl(texts)), validation=sets)
    manifest = prepare(config)
    assert manifest.splits_of("validation") == {"web": "validation/web", "code": "validation/code"}
    counts = {name: manifest.split(split).num_documents for name, split in manifest.splits_of("validation").items()}
    assert counts == {"web": 5, "code": 3}
    assert manifest.split("train").num_documents == len(texts) - 8
    assert TokenDataset(config.prepared_dir, "validation/code").num_documents == 3
    with pytest.raises(DataError, match="no validation text in code: 55 training and 5 validation documents"):
        prepare(
            configure(
                train=str(jsonl(texts)), validation={**sets, "code": sets["web"]}, prepared_dir=str(tmp_path / "empty")
            )
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": [{"name": "a", "files": "x", "weight": 0}]}, "data.train.0.source.weight: Input should be greater"),
        ({"train": [{"name": "a", "files": [], "weight": 1}]}, "data.train.0.source.files: is empty, but needs"),
        ({"train": [{"name": "../a", "files": "x", "weight": 1}]}, "data.train.0.source.name: String should match"),
        ({"train": ["x", {"name": "a", "files": "x", "weight": 1}]}, "a mixture needs a name, files and a weight"),
        ({"train": 2 * [{"name": "a", "files": "x", "weight": 1}]}, "two sources have the name 'a'"),
        ({"train": [{"name": "a", "files": "x", "wieght": 1}]}, "Did you mean 'weight'?"),
        ({"validation": {"../a": "x"}}, "a set needs files and a name"),
        ({"validation": {"a": []}}, "a set needs files and a name"),
    ],
)
def test_a_wrong_mixture_or_set_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"data": values})
    assert message in str(caught.value)


def test_one_text_may_stand_for_a_list_of_them_and_a_configuration_comes_back_as_it_was() -> None:
    config = load_config({"data": {"train": "x", "validation": "y"}})
    assert (config.data.train, config.data.validation) == (["x"], ["y"])
    mixture = {"train": [{"name": "a", "files": "x", "weight": 1}], "validation": {"b": "y"}}
    config = load_config({"data": mixture})
    assert config.data.splits == {"validation/b": ["y"], "train/a": ["x"]}
    assert config.data.train_texts == ["x"]
    assert load_config(json.loads(config.model_dump_json())) == config
