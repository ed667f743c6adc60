"""Cost of windows: the windowed spiking layer against its two convolutions alone.

    python -m benchmarks.general_step --workdir runs/bench-general

Times the gradient of one layer of General SNN on maps of its first stage (16x16, 48
channels), beside the same two convolutions with ReLU, and with LIF, on the whole map.
The layers take turns, so that a change of the machine's speed falls on all of them;
each step is synchronised. Prints a table and writes bench.json.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks.turns import in_turns, ratio
from spikejax import LIF
from spikejax.experiment.cli import parse, run_cli
from spikejax.nn import cpu
from spikejax.nn.windowed import (
    Mixer,
    conv_network,
    lstm_network,
    overlap,
    straight_through,
    tile,
    whole,
)
from spikejax.train import workdir as folder
from spikejax.train.progress import table
from spikejax.train.recipe import check_settings


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Settings of the measurement."""

    workdir: Path = Path("runs/bench-general")
    """Folder for bench.json."""
    repeats: int = 11
    """Timed steps of each layer, each after one that is not."""
    batch_size: int = 32
    """Maps per step."""
    side: int = 16
    """Height and width of a map."""
    channels: int = 48
    """Channels of a map."""

    def __post_init__(self):
        sizes = "repeats", "batch_size", "side", "channels"
        check_settings(self, dict.fromkeys(sizes, ("at least 1", lambda n: n >= 1)))


IS_CPU = jax.default_backend() == "cpu"
convs = partial(conv_network, conv=cpu.Conv if IS_CPU else nnx.Conv)
plain = partial(convs, projection=None)
LAYERS = {
    "two convolutions with ReLU": (partial(plain, neuron=lambda: nnx.relu), whole),
    "two convolutions with LIF": (partial(plain, neuron=LIF), whole),
    "windows tiled, conv": (convs, tile),
    "windows overlapping, conv": (convs, overlap),
    "windows tiled, LSTM": (lstm_network, tile),
    "windows overlapping, LSTM": (lstm_network, overlap),
}


class Step:
    """Compiled gradient of a layer by its weights and its input."""

    def __init__(self, make, window, benchmark):
        rngs = nnx.Rngs(0)
        network = make(benchmark.channels, rngs=rngs)
        layer = Mixer(
            benchmark.channels,
            network,
            window=window,
            binarise=straight_through,
            rngs=rngs,
        )
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

        def loss(params, rest, xs):
            return (nnx.merge(graphdef, params, rest)(xs)[0] ** 2).sum()

        shape = (benchmark.batch_size, 1, benchmark.side, benchmark.side)
        xs = np.random.default_rng(0).random((*shape, benchmark.channels), np.float32)
        self.given = nnx.to_pure_dict(params), nnx.to_pure_dict(rest), xs
        lowered = jax.jit(jax.value_and_grad(loss, (0, 2))).lower(*self.given)
        self.compiled = lowered.compile()

    def __call__(self):
        jax.block_until_ready(self.compiled(*self.given))


def measure(benchmark: Benchmark) -> list[dict]:
    """Return a row per layer: its steps, and their ratio to ReLU's."""
    steps = {
        name: Step(make, window, benchmark) for name, (make, window) in LAYERS.items()
    }
    rows = in_turns(steps, benchmark.repeats)
    first = rows[next(iter(rows))]
    where = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    return [
        {"layer": name, **row, "ratio": ratio(row, first)[1], **where}
        for name, row in rows.items()
    ]


def main(benchmark: Benchmark) -> None:
    """Measure, print the table, write bench.json."""
    rows = measure(benchmark)
    path = benchmark.workdir / "bench.json"
    folder.write(path, rows)
    table(
        f"Gradient of one layer, {benchmark.batch_size} maps of {benchmark.side}x"
        f"{benchmark.side}x{benchmark.channels}",
        ["", "median ms", "quartiles", "to ReLU"],
        [
            [
                row["layer"],
                f"{row['median_ms']:.1f}",
                "{:.1f} to {:.1f}".format(*row["quartiles_ms"]),
                f"{row['ratio']:.2f}",
            ]
            for row in rows
        ],
    )
    print(f"Written: {path}")


if __name__ == "__main__":
    run_cli(main, parse(Benchmark(), __doc__))
