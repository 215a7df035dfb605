"""Which experts do the work: load per layer and domain, specialisation, and how two or more checkpoints differ."""
