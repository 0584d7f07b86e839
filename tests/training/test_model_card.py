"""The model card: it tells the plan, and nothing that nobody said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from steplm.checkpoint import CheckpointState
from steplm.config import RunConfig, load_config
from steplm.planner.plan import Plan
from steplm.planner.plan import plan as make_plan
from steplm.training.model_card import model_card, public_name
from steplm.training.run import train
from steplm.types import LayerProvenance, TrainState

CONFIG = load_config(
    {
        "name": "small",
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
        "data": {"train": ["/home/somebody/corpus.jsonl", "hub://owner/name?split=train", "builtin://python-docs"]},
        "plan": {"layers": [2, 2], "num_stages": 2, "tokens_per_stage": [3_000_000, 4_000_000]},
        "pet": {"rank": 8},
        "train": {"sequence_length": 128},
    }
)


@pytest.fixture
def plan() -> Plan:
    return make_plan(CONFIG)


def state_of(plan: Plan, stage_index: int = 2, stage_done: bool = True) -> CheckpointState:
    old = LayerProvenance(1, (), None)
    return CheckpointState(
        progress=TrainState(
            stage_index, stage_index, 10, 10, plan.total_tokens, phase_done=stage_done, stage_done=stage_done
        ),
        schedule_hash=plan.schedule.hash,
        phase=plan.schedule.phases[stage_index - 1],
        data_fingerprint="0",
        provenance=(
            old,
            LayerProvenance(2, (0, 1), "interpolation_mean"),
            old,
            LayerProvenance(2, (1,), "identity"),
        ),
        trained_names=(),
        optimizer_steps={},
        metrics_bytes=0,
        elapsed_seconds=1.0,
        versions={"torch": "2.13.0"},
    )


def card(config: RunConfig, plan: Plan, state: CheckpointState) -> tuple[dict, str]:
    _, front_matter, body = model_card(config, plan, state).split("---\n", 2)
    return yaml.safe_load(front_matter), body


def test_the_front_matter_says_what_is_known_and_nothing_else(plan: Plan) -> None:
    front_matter, _ = card(CONFIG, plan, state_of(plan))
    assert front_matter == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["steplm", "llama"],
        "datasets": ["owner/name"],
    }


def test_the_plan_is_a_table_of_stages(plan: Plan) -> None:
    _, body = card(CONFIG, plan, state_of(plan))
    rows = [line for line in body.splitlines() if line.startswith(("| 1 | 2 (2 new)", "| 2 | 4 (2 new)"))]
    assert len(rows) == 2
    assert "| 3M | 2 layers, embeddings, final norm, head |" in rows[0]
    assert "2 layers, adapters, embeddings" in rows[1]
    assert f"{plan.reduction:.1%} less" in body
    assert "lora, rank 8, alpha 32" in body


def test_each_layer_is_traced_to_its_parents(plan: Plan) -> None:
    _, body = card(CONFIG, plan, state_of(plan))
    assert "| 0 | 1 |  | fresh or given weights |" in body
    assert "| 1 | 2 | layers 0 and 1 of stage 1 | interpolation_mean |" in body
    assert "| 3 | 2 | layer 1 of stage 1 | identity |" in body


def test_folders_of_the_machine_are_not_published(plan: Plan) -> None:
    text = model_card(CONFIG, plan, state_of(plan))
    assert "- `corpus.jsonl`" in text
    assert "somebody" not in text


def test_a_name_on_the_hub_stays_and_a_path_loses_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_name("owner/name") == "name"
    assert public_name("owner/name", may_be_on_hub=True) == "owner/name"
    for local in ("/name", "~/name", "./name", "../name", "/home/owner/name", "some/owner/name"):
        assert public_name(local, may_be_on_hub=True) == "name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert public_name("owner/name", may_be_on_hub=True) == "name"
    assert public_name("hub://owner/name?split=train") == "hub://owner/name?split=train"


def test_an_export_before_the_end_says_so(plan: Plan) -> None:
    assert "Taken before the end" not in model_card(CONFIG, plan, state_of(plan))
    for unfinished in (state_of(plan, stage_done=False), state_of(plan, stage_index=1)):
        assert "**Taken before the end of its plan**" in model_card(CONFIG, plan, unfinished)


def test_a_plan_of_one_stage_speaks_of_neither_growth_nor_saving() -> None:
    config = load_config({"model": {"num_hidden_layers": 4}, "plan": {"num_stages": 1, "total_tokens": "10M"}})
    plan = make_plan(config)
    state = replace(state_of(plan, stage_index=1), versions={})
    front_matter, body = card(config, plan, state)
    assert "datasets" not in front_matter
    assert "growth" not in body
    assert "than the" not in body
    assert "## Versions" not in body
    assert "## Data" not in body


def test_the_code_on_the_card_runs(
    tiny_run: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export_dir = train(tiny_run(tmp_path / "run")).export_dir
    code = (export_dir / "README.md").read_text().split("```python\n")[1].split("```")[0]
    export_dir.rename(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The")
