"""What spiking costs: a training step with several neurons, side by side.

    python -m benchmarks.training_step --workdir runs/bench

One network (32x32x3, batch 32: convolutions of 64, 128 and 256 channels, the last two
with stride 2, each with batch norm and neurons; mean; dense), its neurons exchanged.
The steps take turns, so that a change of the machine's speed falls on all of them; each
is synchronised. Prints a table and writes bench.json.
"""

import dataclasses
import json
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from spikejax import LIF, MultiThreshold, encode, losses, neurons, td_batch_norm
from spikejax.compat import List
from spikejax.flags import parse, reported
from spikejax.progress import table
from spikejax.step import TrainConfig, initial_state, make_optimizer, make_train_step


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How to measure."""

    workdir: Path = Path("runs/bench")
    """Folder for bench.json."""
    repeats: int = 11
    """Timed steps of each network, after two that are not."""
    batch_size: int = 32
    """Images a step."""


class Network(nnx.Module):
    """Three convolutions, two of them with stride 2."""

    def __init__(self, neuron, rngs):
        conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        shapes = ((3, 64, 1), (64, 128, 2), (128, 256, 2))
        self.convs = List(conv(a, b, strides=(s, s)) for a, b, s in shapes)
        self.norms = List(td_batch_norm(b, rngs=rngs) for _, b, _ in shapes)
        self.neurons = List(neuron() for _ in shapes)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, xs):
        for conv, norm, neuron in zip(
            self.convs, self.norms, self.neurons, strict=True
        ):
            xs = neuron(norm(conv(xs)))
        return self.head(xs.mean((2, 3)))


PARALLEL = partial(MultiThreshold, 4, neurons.parallel, decay_input=False)
CASCADE = partial(MultiThreshold, 4, neurons.cascade, decay_input=False)
NETWORKS = {
    "ReLU, T=1": (lambda: nnx.relu, 1),
    "LIF, T=1": (partial(LIF, decay_input=False), 1),
    "multi-threshold parallel N=4, T=1": (PARALLEL, 1),
    "multi-threshold cascade N=4, T=1": (CASCADE, 1),
    "LIF, T=4": (partial(LIF, decay_input=False), 4),
}


class Step:
    """A compiled training step with its state."""

    def __init__(self, neuron, time_steps, batch_size):
        model = Network(neuron, nnx.Rngs(0))
        model.train()
        config = TrainConfig(steps=100)
        optimizer = make_optimizer(config, 100)
        self.state = initial_state(model, optimizer, config)
        rng = np.random.default_rng(0)
        self.batch = {
            "image": rng.normal(size=(batch_size, 32, 32, 3)).astype(np.float32),
            "label": rng.integers(0, 10, batch_size).astype(np.int32),
        }
        step = make_train_step(
            nnx.graphdef(model),
            losses.rate_cross_entropy,
            lambda images, rng: encode.direct(images, time_steps),
            optimizer,
        )
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, self.batch)
        self.compiled = lowered.compile()

    def __call__(self):
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))

    def peak_mib(self) -> float:
        """Arguments and scratch memory, by the compiler's own account."""
        memory = self.compiled.memory_analysis()
        return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20


def measure(benchmark: Benchmark) -> list[dict]:
    """One row a network: median of the steps, and its ratio to ReLU's."""
    if benchmark.repeats < 1 or benchmark.batch_size < 1:
        raise ValueError(
            f"bench: expected repeats and batch_size >= 1, got {benchmark.repeats} and "
            f"{benchmark.batch_size}."
        )
    steps = {n: Step(*of, benchmark.batch_size) for n, of in NETWORKS.items()}
    times = {name: [] for name in steps}
    for turn in range(benchmark.repeats + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - began))
    first = statistics.median(times["ReLU, T=1"])
    return [
        {
            "workload": f"training step, {name}",
            "library": "spikejax",
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "max_ms": max(values),
            "ratio_to_relu": statistics.median(values) / first,
            "peak_mib": steps[name].peak_mib(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
        for name, values in times.items()
    ]


def main(benchmark: Benchmark) -> None:
    """Measure, print the table, write bench.json."""
    rows = measure(benchmark)
    benchmark.workdir.mkdir(parents=True, exist_ok=True)
    path = benchmark.workdir / "bench.json"
    path.write_text(json.dumps(rows, indent=2))
    table(
        f"Training step, batch {benchmark.batch_size}",
        ["", "median ms", "min to max", "to ReLU", "peak MiB"],
        [
            [
                row["workload"].removeprefix("training step, "),
                f"{row['median_ms']:.0f}",
                f"{row['min_ms']:.0f} to {row['max_ms']:.0f}",
                f"{row['ratio_to_relu']:.2f}",
                f"{row['peak_mib']:.0f}",
            ]
            for row in rows
        ],
    )
    print(f"Written: {path}")


if __name__ == "__main__":
    reported(main, parse(Benchmark(), __doc__))
