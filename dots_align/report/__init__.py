"""One self-contained HTML page about a run: curves, expert load, sampled answers, recipes."""
