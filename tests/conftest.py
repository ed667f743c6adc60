"""Sets JAX up for the tests, before any test imports it, and finds the data.

SPIKEJAX_TEST_PLATFORM=cuda (or tpu) runs the tests there; SPIKEJAX_DATA is the
folder of prepared TFDS data sets, without which some tests are skipped. Machine code
is not optimised, but in the notebooks: XLA_FLAGS=--xla_backend_optimization_level=3.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _set_up_jax() -> None:
    platform = os.environ.get("SPIKEJAX_TEST_PLATFORM", "cpu")
    flags = ["--xla_force_host_platform_device_count=8"]
    if platform == "cpu":
        flags.append("--xla_backend_optimization_level=0")  # compiles twice as fast
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
        flags.append("--xla_cpu_multi_thread_eigen=false")
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in flags if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *missing])
    os.environ["JAX_PLATFORMS"] = platform
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


_set_up_jax()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of prepared TFDS data sets."""
    given = os.environ.get("SPIKEJAX_DATA")
    path = Path(given) if given else ROOT.parent / "shared/data/tfds"
    if not path.is_dir():
        pytest.skip(f"no data in {path}: set SPIKEJAX_DATA to a TFDS folder")
    return path
