"""Benchmarks: ``python -m benchmarks.training_step``; ratios within one run."""
