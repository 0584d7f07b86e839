"""Model-state bytes: one function per term, the estimate of a stage, and the measurement beside it."""
