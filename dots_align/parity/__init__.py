"""Proof that everything which runs a checkpoint computes the same model, and a name for what does not."""
