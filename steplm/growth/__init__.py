"""Model growth: pure functions on named tensors that build a deeper model from existing layers."""
