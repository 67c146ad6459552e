"""The training phases at full size without a GPU: on tensors of shapes and no memory, bytes and FLOPs counted."""
