"""One file a library: ``prepare(sizes, mode)`` builds its network, ready to run."""
