"""Evaluation of saved checkpoints."""
