"""The phases on one GPU or many: tmd_minimal's loops with sharding, gradient accumulation, LoRA and a log."""
