"""Ours against stock, in one run: `python -m benchmarks`."""
