"""Plan the training of any Hugging Face model, and deepen it without changing what it computes.

    python examples/deepen.py [MODEL_FOLDER]

Without a folder a tiny random Llama is made in a temporary one; takes seconds on a CPU.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from steplm import grow, load_config, plan


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(sys.argv[1]) if len(sys.argv) > 1 else _tiny_model(Path(temporary) / "tiny")
        for overrides in (["plan.num_stages=1"], ["plan.num_stages=2"], ["plan.num_stages=1", "optim.name=muon"]):
            planned = plan(load_config(model, ["plan.total_tokens=10M", "pet.rank=8", *overrides]))
            print(f"{' '.join(overrides)}: {planned.peak_model_state_bytes:,} bytes of model state")

        deeper = Path(temporary) / "deeper"
        old = AutoModelForCausalLM.from_pretrained(model)
        grow(model, to=old.config.num_hidden_layers + 2, output_dir=deeper, operator="identity")
        new = AutoModelForCausalLM.from_pretrained(deeper)
        tokens = torch.arange(16).unsqueeze(0)
        with torch.no_grad():
            same = torch.equal(old(tokens).logits, new(tokens).logits)
        print(f"{old.config.num_hidden_layers} -> {new.config.num_hidden_layers} layers, same logits: {same}")


def _tiny_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
