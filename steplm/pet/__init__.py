"""Parameter-efficient training: adapters on frozen layers, and which parameters are trained."""
