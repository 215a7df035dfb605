"""The dots1 model: presets, router statistics, adapters, log-probabilities."""
