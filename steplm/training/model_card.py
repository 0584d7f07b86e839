"""The model card of an export: a Hugging Face ``README.md`` that describes how the model was trained."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import count, pairwise
from pathlib import Path

import yaml

from steplm.checkpoint import CheckpointState
from steplm.config import RunConfig
from steplm.cost.rules import ADAMW
from steplm.planner.plan import Plan, Stage
from steplm.schedule import Trained
from steplm.types import LayerProvenance
from steplm.units import format_bytes, format_count

COMPONENTS = {
    "trained_layers": "layers",
    "frozen_layers": "earlier layers",
    "adapters": "adapters",
    "embeddings": "embeddings",
    "final_norm": "final norm",
    "head": "head",
}


def model_card(config: RunConfig, plan: Plan, state: CheckpointState) -> str:
    """Markdown with YAML front matter: what the model is, its plan, the origin of its layers, how to load it.

    Fields that the config does not state (license, language) are omitted. Local data files appear without their folder.

    Args:
        state: state of the exported checkpoint, which may be from before the end of the plan.
    """
    data = [f"- `{public_name(text)}`" for text in config.data.train_texts]
    sections = [
        _front_matter(config),
        f"# {config.name}",
        _introduction(config, plan, state),
        "## Load it",
        _how_to_load(config),
        "## How it was trained",
        _plan_paragraph(plan),
        _table(("stage", "layers", "tokens", "trained", "model states"), map(_stage_row, plan.stages)),
        _pet_and_growth(config, plan),
        "## Where each layer comes from",
        _table(("layer", "born in stage", "made of", "by"), map(_layer_row, count(), state.provenance)),
        *(["## Data", "\n".join(dict.fromkeys(data))] if config.data.train else []),
        *(["## Versions", _table(("package", "version"), state.versions.items())] if state.versions else []),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(config: RunConfig) -> str:
    values: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["steplm", config.model.model_type],
    }
    on_hub = [entry.removeprefix("hub://") for entry in config.data.train_texts if entry.startswith("hub://")]
    if on_hub:
        values["datasets"] = list(dict.fromkeys(entry.split("?")[0] for entry in on_hub))
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _introduction(config: RunConfig, plan: Plan, state: CheckpointState) -> str:
    progress = state.progress
    depth = plan.stages[progress.stage_index - 1].num_hidden_layers
    kind = "in one stage" if len(plan.layers) == 1 else f"in {len(plan.layers)} stages of growing depth"
    text = (
        f"A plain `{config.model.model_type}` language model of {depth} layers and "
        f"{format_count(plan.shape.num_parameters(depth))} parameters, pre-trained {kind} on "
        f"{format_count(progress.tokens_seen)} tokens. Adapters, if there were any, are merged in."
    )
    is_final = progress.stage_done and progress.stage_index == plan.num_stages
    if not is_final:
        text += (
            f"\n\n**Taken before the end of its plan**: stage {progress.stage_index} of {plan.num_stages}, "
            f"{format_count(progress.tokens_seen)} of {format_count(plan.total_tokens)} tokens."
        )
    return text


def _how_to_load(config: RunConfig) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{config.name}"  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""


def _plan_paragraph(plan: Plan) -> str:
    peak, vanilla = plan.peak_model_state_bytes, plan.vanilla_model_state_bytes
    states = f"weights, gradients and optimizer states, {plan.precision}"
    if peak == vanilla:
        return f"Model states ({states}) take {format_bytes(peak)}."
    word = "less" if plan.reduction > 0 else "more"
    return (
        f"Model states ({states}) take at most {format_bytes(peak)}: {abs(plan.reduction):.1%} {word} than "
        f"the {format_bytes(vanilla)} of training the whole model at once. Activations are not counted."
    )


def _stage_row(stage: Stage) -> Sequence[object]:
    names = {**COMPONENTS, "trained_layers": f"{len(stage.highest_phase.trained_layers)} layers"}
    return (
        stage.index,
        f"{stage.num_hidden_layers} ({stage.num_new_layers} new)",
        format_count(stage.tokens),
        ", ".join(words for name, words in names.items() if stage.memory.bytes_of(name, "optimizer")),
        format_bytes(stage.memory.total_bytes),
    )


def _pet_and_growth(config: RunConfig, plan: Plan) -> str:
    lines = []
    if len(plan.layers) > 1:
        lines.append(f"- growth: `{config.growth.operator}`, new layers placed `{config.growth.resolved_position}`")
    phases = plan.schedule.phases
    rules = dict.fromkeys(role.rule for phase in phases for role in phase.layers if isinstance(role, Trained))
    if set(rules) - {ADAMW}:
        lines.append(f"- update rules of the layers' matrices: {', '.join(f'`{rule}`' for rule in rules)}")
    adapters = next((adapter for phase in phases for adapter in phase.adapters.values()), None)
    if adapters is not None:
        targets = ", ".join(f"`{name}`" for name in adapters.target_modules)
        size = f"rank {adapters.rank}, alpha {adapters.alpha:g}"
        restarts = sum(phase.entry.kind == "merge" and before.has_adapters for before, phase in pairwise(phases))
        times = f", merged and restarted {restarts} times" if restarts else ""
        lines.append(f"- adapters on frozen layers: {adapters.method}, {size}, on {targets}{times}")
    return "\n".join(lines)


def _layer_row(index: int, layer: LayerProvenance) -> Sequence[object]:
    made_of = ""
    if layer.parents:
        word = "layer" if len(layer.parents) == 1 else "layers"
        made_of = f"{word} {' and '.join(map(str, layer.parents))} of stage {layer.born_in_stage - 1}"
    return index, layer.born_in_stage, made_of, layer.operator or "fresh or given weights"


def public_name(entry: str, *, may_be_on_hub: bool = False) -> str:
    """Make a name publishable: drop the folders of local paths, which reveal the machine; keep hub:// and other URLs.

    Args:
        may_be_on_hub: whether ``owner/name`` is a hub name if no such path exists.
    """
    path = Path(entry)
    is_local = os.path.exists(path) or len(path.parts) != 2 or entry.startswith((".", "/", "~"))
    is_on_hub = "://" in entry or (may_be_on_hub and not is_local)
    return entry if is_on_hub else path.name


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
