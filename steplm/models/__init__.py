"""Models: building them, loading and saving them, and computing their loss without full logits."""
