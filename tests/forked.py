"""Child processes that are forked from one that has imported everything, once.

Importing JAX, Orbax, Grain and TFDS takes half of the CPU time of a short training.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds until a child counts as hanging
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["spikejax.experiment", "spikejax.plot", "spikejax.train.checkpoint"]
    + ["grain", "tensorflow_datasets", "rich.progress", "sklearn.datasets"]
    + ["tensorboardX.event_file_writer", "matplotlib.pyplot"]
)


def _run(target, args, devices, out, err):
    """What the child does: a session and an output of its own, and no cache."""
    os.setsid()
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    # JAX reads the flags when it is first used. A kill could tear entries of a cache.
    given = os.environ["XLA_FLAGS"].split("--xla_force_host_platform_device_count=")
    count = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = given[0] + count + given[1].lstrip("0123456789")
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        target(*args)
    finally:
        # A child of multiprocessing leaves without these. JAX's waits until all
        # processes have left: else one may go while another is still gathering.
        atexit._run_exitfuncs()


class Child:
    """A function in a process of its own, which is gone after the with statement."""

    def __init__(self, target, *args, devices):
        self.files = [Path(tempfile.mkstemp()[1]) for _ in range(2)]
        arguments = (target, args, devices, *map(str, self.files))
        self.process = CONTEXT.Process(target=_run, args=arguments)

    def __enter__(self):
        self.process.start()
        return self

    def __exit__(self, *_):
        if self.process.is_alive():
            self.send(signal.SIGKILL)
        self.process.join(PATIENCE)
        for path in self.files:
            path.unlink()

    def send(self, number):
        os.kill(self.process.pid, number)

    def finish(self):
        """(exit code, stdout, stderr)"""
        self.process.join(PATIENCE)
        out, err = (path.read_text() for path in self.files)
        return self.process.exitcode, out, err
