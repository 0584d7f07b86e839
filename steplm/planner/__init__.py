"""The plan of a run: how the depth is divided into stages, and what each stage costs. Needs no torch."""
