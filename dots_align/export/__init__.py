"""Deployable chat checkpoints, verified by loading them."""
