"""Cost model: memory, FLOPs and step time of a phase, and measurement of its actual memory."""
