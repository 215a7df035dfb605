"""Post-training and RL for dots.llm1-class mixture-of-experts models."""

__version__ = "0.1.0"
