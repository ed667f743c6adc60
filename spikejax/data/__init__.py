"""Data sets on the host, as batches: images, recordings of events, sequences."""
