"""Several processes that train one model: who is who, and the model cut over them. PyTorch's FSDP2 does the work."""
