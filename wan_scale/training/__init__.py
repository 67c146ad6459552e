"""The phases on one GPU or many: the loops of tmd_minimal with sharded networks, gradient accumulation, LoRA and a log."""
