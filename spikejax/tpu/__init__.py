"""Plans for TPU slices: memory and time of a training step, before it is paid for."""
