"""steplm's update rules in a training loop of your own: Muon for the matrices of layers, AdamW for all else.

    python examples/own_loop.py

A tiny Llama learns to count; takes seconds on a CPU.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steplm.optim import AdamW, Muon, RuleOptimizer

NUM_STEPS = 60


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)

    # Muon is for the linear layers inside the decoder layers; embeddings, head, norms and biases stay with AdamW.
    named = dict(model.named_parameters())
    hidden = {name: p for name, p in named.items() if p.ndim == 2 and ".layers." in name}
    rest = {name: p for name, p in named.items() if name not in hidden}
    rules = [
        Muon(hidden, states="8bit", master_weights=False),  # 1 byte a parameter beside the bf16 weight
        AdamW(rest),
    ]
    optimizer = RuleOptimizer(rules, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, NUM_STEPS)

    for step in range(NUM_STEPS):
        first = torch.randint(0, config.vocab_size, (16, 1))
        ids = (first + torch.arange(24)) % config.vocab_size
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1:3}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
