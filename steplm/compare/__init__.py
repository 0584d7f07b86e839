"""Suites: many runs over methods, seeds and learning rates, matched, tuned, resumable."""
