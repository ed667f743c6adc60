"""Scripts: ``python -m experiments.NAME --workdir DIR``."""
