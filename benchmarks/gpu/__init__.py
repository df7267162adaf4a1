"""python -m benchmarks.gpu: one command that checks and measures everything on one card; see `__main__`."""
