"""Growth: more layers from the layers there are. Pure functions on plain, named tensors."""
