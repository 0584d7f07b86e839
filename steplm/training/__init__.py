"""Training runs: phase setup, the step loop, checkpointing, and export."""
