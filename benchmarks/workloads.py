"""Workloads of the comparison: networks and sizes, the same for every library.

Neurons are LIF with u = v / 2 + x (tau = 2, decay_input off, which every library has),
threshold 1, soft reset without a gradient, and the ATan surrogate of width 2. Where a
library has something else, its side says so. Weights and data are the same numbers, so
networks that compute the same have the same loss; biases start at zero.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Run:
    """A mode of a library, with its time steps."""

    library: str
    mode: str
    time_steps: int

    @property
    def label(self) -> str:
        return f"{self.library} {self.mode}, T={self.time_steps}"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a workload, for a side."""

    network: str
    """convolutions, linear, pooled, resnet18 or whitened."""
    batch_size: int
    time_steps: int
    side: int
    """Side of the images, in pixels."""
    channels: tuple[int, ...]
    """Channels of each layer of neurons; the resnet's are those of its four stages."""
    trains: bool = True
    """A training step, else the answer to a batch in evaluation mode."""
    in_a_row: int = 1
    """Steps that follow one another without a pause, of which the mean is timed."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A comparison: sizes, runs, and the pairs to compare."""

    title: str
    sizes: Sizes
    runs: tuple[Run, ...]
    repeats: int
    reference: str = "SpikingJelly"
    """The library whose fastest run the others are measured against."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Labels of runs that are set against one another besides."""
    peak: bool = False
    """Whether peak memory is measured too."""


def _runs(*groups: tuple[str, tuple[tuple[str, int], ...]]) -> tuple[Run, ...]:
    return tuple(Run(library, *run) for library, runs in groups for run in runs)


MULTI, RELU = "spikejax multi-threshold, T=1", "spikejax ReLU, T=1"
_OURS = ("LIF", 4), ("multi-threshold", 1), ("LIF", 1), ("ReLU", 1), ("ReLU", 4)
_THEIRS = (
    ("SpikingJelly", (("step by step", 4), ("multi-step", 4), ("compiled", 4))),
    ("PyTorch", (("ReLU", 4),)),
    ("snnTorch", (("step by step", 4), ("folded", 4))),
    ("Spyx", (("folded", 4),)),
)
_SMALL = Sizes("convolutions", 32, 4, 32, (64, 128, 256))
_ONE = dataclasses.replace(_SMALL, batch_size=1, trains=False)

WORKLOADS = {
    "step": Workload(
        "Training step: 3 convolutions, batch 32 of 32x32x3",
        _SMALL,
        _runs(("spikejax", (*_OURS, ("cascade", 1))), *_THEIRS),
        repeats=15,
        pairs=(
            (MULTI, RELU),
            ("spikejax LIF, T=4", "spikejax ReLU, T=4"),
            ("SpikingJelly multi-step, T=4", "PyTorch ReLU, T=4"),
        ),
        peak=True,
    ),
    "linear": Workload(
        "Gradient of linear and LIF (Open Neuromorphic's), batch 16",
        Sizes("linear", 16, 500, 0, (512,)),
        _runs(
            ("spikejax", (("LIF", 500),)),
            ("SpikingJelly", (("step by step", 500), ("multi-step", 500))),
            ("snnTorch", (("step by step", 500), ("folded", 500))),
            ("Spyx", (("folded", 500),)),
        ),
        repeats=15,
        reference="Spyx",
    ),
    "spikingjelly": Workload(
        "Training step of SpikingJelly's own benchmark, batch 64 of 64x64x3",
        Sizes("pooled", 64, 16, 64, (64, 128, 1024)),
        _runs(
            ("spikejax", (("LIF", 16),)),
            (
                "SpikingJelly",
                (("step by step", 16), ("multi-step", 16), ("compiled", 16)),
            ),
        ),
        repeats=3,
    ),
    "resnet18": Workload(
        "Training step: SEW-ResNet-18, batch 64 of 32x32x3",
        Sizes("resnet18", 64, 4, 32, (64, 128, 256, 512)),
        _runs(
            ("spikejax", (*_OURS[:2], _OURS[3], ("LIF recomputed", 4))),
            ("SpikingJelly", (("step by step", 4), ("multi-step", 4))),
        ),
        repeats=5,
        pairs=((MULTI, RELU),),
        peak=True,
    ),
    "whitened": Workload(
        "Training step of CIFAR-10's fast recipe, batch 256 of 32x32x3",
        Sizes("whitened", 256, 4, 32, (64, 256, 256)),
        _runs(
            ("spikejax", (_OURS[1], _OURS[3], _OURS[0])),
            ("SpikingJelly", (("multi-step", 4), ("compiled", 4))),
        ),
        repeats=5,
        pairs=((MULTI, RELU),),
    ),
    "latency": Workload(
        "Answer to one image of 32x32x3, after a pause: 3 convolutions",
        _ONE,
        _runs(("spikejax", _OURS), *_THEIRS),
        repeats=101,
        pairs=((MULTI, RELU),),
    ),
    "stream": Workload(
        "Answer to one image of 32x32x3 after the other: 3 convolutions",
        dataclasses.replace(_ONE, in_a_row=200),
        _runs(("spikejax", _OURS), *_THEIRS),
        repeats=9,
        pairs=((MULTI, RELU),),
    ),
}


@dataclasses.dataclass
class Prepared:
    """A network that is ready, with the figures that the worker reports."""

    step: Callable[[], float]
    """Takes one step, waits for its end, returns the loss."""
    parameters: int
    """Their number."""
    held_bytes: int
    """Return the bytes in memory before the first step: parameters, data, optimiser."""
    versions: dict[str, str]
    device: str
    compile_s: float = 0.0
    """Seconds of compilation before the first step."""
    compiled_mib: float | None = None
    """Peak memory by the compiler's account, where it gives one."""
    device_peak: Callable[[], int] | None = None
    """Peak bytes of an accelerator's allocator since the last call."""


STRIDES = (1, 2, 2)  # of the three convolutions
CLASSES = 10


def filters() -> np.ndarray:
    """The products of cosines before the first layer of ``whitened``, [12, 3, 2, 2].

    Those of spikejax.models.whitened, for interpreters without JAX.
    """

    def cosines(n: int) -> np.ndarray:
        k, place = np.arange(n)[:, None], np.arange(n)
        rows = np.cos(np.pi * k * (2 * place + 1) / (2 * n))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    rows = np.kron(np.kron(cosines(2), cosines(2)), cosines(3))  # over (y, x, colour)
    return rows.reshape(12, 2, 2, 3).transpose(0, 3, 1, 2).astype(np.float32)


def weights(index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Layer ``index``, of shape [outputs, inputs, ...]: normal, variance 2 / fan-in."""
    rng = np.random.default_rng((1, index))
    scale = np.sqrt(2 / np.prod(shape[1:]))
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def batch(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """The input and its labels.

    Currents [B, T, n] in 0..1 for ``linear``, images [B, T, H, W, 3] for ``pooled``,
    else images [B, H, W, 3], which every step sees.
    """
    rng = np.random.default_rng(0)
    count, steps, side = sizes.batch_size, sizes.time_steps, sizes.side
    labels = rng.integers(0, CLASSES, count)
    if sizes.network == "linear":
        return rng.random((count, steps, *sizes.channels), np.float32), labels
    time = (steps,) if sizes.network == "pooled" else ()
    images = rng.standard_normal((count, *time, side, side, 3), np.float32)
    return images, labels
