"""One file per training stage; each `run(recipe)` reads as load, build, train, publish."""
