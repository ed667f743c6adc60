"""Benchmarks: ``python -m benchmarks.versus``; ratios within one run."""
