"""Plan a run without torch: how the depth is divided into stages, and what each stage costs."""
