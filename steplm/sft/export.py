"""Exports the result as a plain Hugging Face folder: weights, tokenizer, chat template, generation config, card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from steplm.files import replacing
from steplm.models.build import plain_state
from steplm.models.folder import as_token_list, save_folder, save_generation_config
from steplm.models.names import short_name
from steplm.sft.config import SftConfig
from steplm.sft.types import SftResult
from steplm.training.model_card import public_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def export_model(
    folder: Path,
    model: PreTrainedModel,
    *,
    model_name: str,
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    end_ids: Sequence[int],
    data: Sequence[str],
    config: SftConfig,
    result: SftResult,
    counts: Mapping[str, int],
) -> None:
    """Write ``folder`` atomically: completely, or not at all.

    Args:
        model: without adapters, in the dtype to be saved.
        hf_config: the config as loaded; training may have changed the model's own.
        end_ids: tokens that end an answer, at which generation stops.
    """
    hf_config.use_cache = True
    hf_config.pad_token_id = tokenizer.pad_token_id
    if hf_config.eos_token_id is None:
        hf_config.eos_token_id = tokenizer.eos_token_id
    with replacing(folder) as temporary:
        save_folder(temporary, hf_config, plain_state(model))
        tokenizer.save_pretrained(temporary)
        save_generation_config(_generation_config(model_name, hf_config, tokenizer, end_ids), temporary)
        (temporary / "README.md").write_text(_card(model_name, data, config, result, counts), encoding="utf-8")


def _generation_config(
    model_name: str, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int]
) -> GenerationConfig:
    """The model's own generation config, extended to stop at every token that ends an answer."""
    try:
        generation = GenerationConfig.from_pretrained(model_name)
    except OSError:
        generation = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95)
    known = generation.eos_token_id if generation.eos_token_id is not None else hf_config.eos_token_id
    stops = list(dict.fromkeys([*end_ids, *as_token_list(known), tokenizer.eos_token_id]))
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    return generation


def _card(model_name: str, data: Sequence[str], config: SftConfig, result: SftResult, counts: Mapping[str, int]) -> str:
    base = short_name(model_name)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["steplm", "sft"]}
    how = "all parameters" if config.lora_rank is None else f"LoRA of rank {config.lora_rank}, merged"
    losses = f"train loss {result.train_loss:.4f}"
    if result.validation_loss is not None and result.validation_loss_before is not None:
        losses += f", held-out loss {result.validation_loss_before:.4f} before and {result.validation_loss:.4f} after"
    names = ", ".join(f"`{public_name(entry)}`" for entry in data)
    kept = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# Instruction-tuned {base}

`{base}`, tuned on {names} by steplm: {how}, {result.num_steps:,} steps at a highest learning rate of
{config.highest_learning_rate:g}, loss on the answers only. Records: {kept}.
In nats per token of the answers: {losses}.

```python
from transformers import pipeline

chat = pipeline("text-generation", "PATH")
print(chat([{{"role": "user", "content": "Name three colors."}}])[0]["generated_text"][-1]["content"])
```
"""
