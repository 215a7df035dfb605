"""The rollout engine: continuous batching on the trainer's own weights."""
