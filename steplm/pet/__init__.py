"""Parameter-efficient training: adapters, compact storage of frozen layers, and selection of trained parameters."""
