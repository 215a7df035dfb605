"""A release is a gate: a chat checkpoint is marked only once everything about it has been proven."""
