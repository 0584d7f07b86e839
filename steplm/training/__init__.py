"""A run: entering phases, the step loop, checkpoints and the export."""
