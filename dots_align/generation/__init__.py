"""`dots-align generate`: samples of every prompt of a file, in bulk."""
