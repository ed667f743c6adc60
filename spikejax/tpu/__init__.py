"""Memory and time of a training step on a TPU slice, known without the slice."""
