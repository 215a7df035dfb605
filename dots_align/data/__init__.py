"""From files on disk to validated, tokenized records."""
