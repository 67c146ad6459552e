"""The training phases at full size without a GPU: on tensors that have shapes and no memory, bytes and FLOPs counted."""
