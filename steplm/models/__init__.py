"""Building models, running them layer by layer, and their loss without logits."""
