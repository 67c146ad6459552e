"""Training data: prompts, the teacher's clips or videos, and the shards that training reads."""
