"""Evaluation of finished models: perplexity, zero-shot tasks, text generation and chat."""
