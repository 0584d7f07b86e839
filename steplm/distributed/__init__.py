"""Distributed training: process setup and coordination, and model sharding with PyTorch's FSDP2."""
