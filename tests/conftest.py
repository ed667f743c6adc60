"""JAX's set-up for the tests, made before any test imports it, and the place of data.

SPIKEJAX_TEST_PLATFORM=cuda (or tpu) runs the tests there; SPIKEJAX_DATA is the folder
of prepared TFDS data sets, without which some tests are skipped.
"""

import gc
import os
import signal
import sys
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
        # Small programs are not worth being split for several threads: 100 ms instead
        # of 130 for the gradient of a convolution, a norm and a neuron.
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
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


def pytest_collection_finish():
    """Spare the garbage collector what stays: 1.2 s of 17 in four tests of windows."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def loops():
    """Make a loop alone of 5 to 16 steps.

    The program written out for a TPU is else traced beside it, and derived with it, for
    most of the CPU time of a test.
    """
    import spikejax  # noqa: F401

    # ``import spikejax.unroll as x`` would give the function: the package exports it.
    module = sys.modules["spikejax.unroll"]
    on_tpu, module.UNROLLED_ON_TPU = module.UNROLLED_ON_TPU, module.UNROLLED
    return on_tpu


@pytest.fixture
def written_for_tpus(loops, monkeypatch):
    """Trace both programs, as users do."""
    monkeypatch.setattr(sys.modules["spikejax.unroll"], "UNROLLED_ON_TPU", loops)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of prepared TFDS data sets."""
    given = os.environ.get("SPIKEJAX_DATA")
    path = Path(given) if given else ROOT.parent / "shared/data/tfds"
    if not path.is_dir():
        pytest.skip(f"no data in {path}: set SPIKEJAX_DATA to a TFDS folder")
    return path
