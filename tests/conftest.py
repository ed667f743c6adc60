"""JAX's set-up for the tests, made before any test imports it, and the place of data.

SPIKEJAX_TEST_PLATFORM=cuda (or tpu) runs the tests there; SPIKEJAX_DATA is the folder
of prepared TFDS data sets, without which some tests are skipped.
"""

import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _set_up_jax() -> None:
    platform = os.environ.get("SPIKEJAX_TEST_PLATFORM", "cpu")
    flags = ["--xla_force_host_platform_device_count=8"]
    if platform == "cpu":
        # Most programs of the tests run once. Not optimised, they compile in half of
        # the CPU time; without the fusion emitters (MLIR) in a third of the rest: 0.4 s
        # instead of 1.5 s for the step of a small ResNet.
        flags.append("--xla_backend_optimization_level=0")
        # XLA aborts at an unknown flag, as this one is in jaxlib 0.12.
        if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
            flags.append("--xla_cpu_use_fusion_emitters=false")
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
        flags.append("--xla_cpu_multi_thread_eigen=false")
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in flags if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *missing])
    os.environ["JAX_PLATFORMS"] = platform
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


_set_up_jax()
# A shell ignores these for what it runs in the background, and nohup SIGHUP; tests send
# them to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of prepared TFDS data sets."""
    given = os.environ.get("SPIKEJAX_DATA")
    path = Path(given) if given else ROOT.parent / "shared/data/tfds"
    if not path.is_dir():
        pytest.skip(f"no data in {path}: set SPIKEJAX_DATA to a TFDS folder")
    return path
