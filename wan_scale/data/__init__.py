"""Training data: model folders, prompts, the teacher's clips, videos, and the shards that training reads. Knows nothing of training."""
