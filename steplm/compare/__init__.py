"""Suites of runs over methods, seeds and learning rates: matched, tuned and resumable."""
