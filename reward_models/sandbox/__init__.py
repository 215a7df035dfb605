"""Running code that a model wrote against tests it must not see or touch; see `run`.

Empty, because every run imports it anew.
"""
