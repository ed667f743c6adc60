"""A training step on 1, 2, 4 and 8 devices of one machine: what sharding costs.

    python -m benchmarks.devices --workdir runs/devices

The same batch for all, so the same work: devices of one CPU share its processors, and
an ideal step takes as much CPU time on eight as on one. The rest is what each device
does for itself (updates of its copy of the parameters), and the exchange. Steps of
``spikejax.train.fit``, in turns, each after one of its own that does not count. Prints
a table and writes devices.json.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.turns import in_turns
from spikejax import encode, losses
from spikejax.experiment.build import MultiThresholdOptions, VGGOptions, build_model
from spikejax.experiment.cli import parse, run_cli
from spikejax.tpu.hlo import collectives
from spikejax.train import TrainConfig, sharding
from spikejax.train import workdir as folder
from spikejax.train.loop import graphs, jit_train_step
from spikejax.train.progress import table
from spikejax.train.recipe import check_settings, make_optimizer
from spikejax.train.step import initial_state

MODEL, COUNTS = "whitened-small", (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Settings of the measurement."""

    workdir: Path = Path("runs/devices")
    """Folder for devices.json."""
    repeats: int = 9
    """Timed steps on each number of devices, each after one that is not."""
    batch_size: int = 128
    """Images of all devices together."""

    def __post_init__(self):
        check_settings(
            self,
            {
                "repeats": ("at least 1", lambda n: n >= 1),
                "batch_size": ("multiples of 8", lambda n: n % max(COUNTS) == 0 < n),
            },
        )


def prepare(flags: Benchmark, count: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return the step on so many devices, and the row of its figures."""
    neuron = MultiThresholdOptions(surrogate="rectangle")
    shapes = {"num_classes": 10, "in_channels": 3, "seed": 0}
    model = build_model(VGGOptions(MODEL), neuron, **shapes)
    config = TrainConfig(steps=1, batch_size=flags.batch_size)
    optimizer = make_optimizer(config, 1)
    mesh = sharding.data_mesh(jax.devices()[:count])
    state = sharding.place_state(initial_state(model, optimizer, config), mesh)
    random = np.random.default_rng(0)
    shape = flags.batch_size, 32, 32, 3
    host = {
        "image": random.normal(size=shape).astype(np.float32),
        "label": random.integers(10, size=flags.batch_size, dtype=np.int32),
    }
    batch = sharding.shard_batch(host, mesh)

    def one_step(images: jax.Array, key: jax.Array) -> jax.Array:
        return encode.direct(images, 1)

    graphdef, _ = graphs(model)
    parts = graphdef, losses.rate_cross_entropy, one_step, optimizer, state
    compiled = jit_train_step(config, *parts, mesh).lower(state, batch).compile()
    exchanged = collectives(str(compiled.as_text()))

    def step() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, batch))
        row.setdefault("loss", float(metrics["loss"]))  # of the first step

    row: dict[str, Any] = {
        "devices": count,
        "exchanges": [dataclasses.asdict(c) for c in exchanged],
    }
    return step, row


def main(flags: Benchmark) -> None:
    """Measure, print the table, write devices.json."""
    if jax.device_count() < max(COUNTS):
        raise ValueError(
            f"devices: expected {max(COUNTS)} devices, got {jax.device_count()}. Set "
            "JAX_PLATFORMS=cpu."
        )
    rows, steps = {}, {}
    for count in COUNTS:
        steps[count], rows[count] = prepare(flags, count)
    for count, times in in_turns(steps, flags.repeats).items():
        rows[count] |= times
    first = rows[COUNTS[0]]
    folder.write(flags.workdir / "devices.json", list(rows.values()))
    table(
        f"{MODEL}, batch {flags.batch_size}",
        ["devices", "median ms", "CPU ms", "CPU, to one", "exchanges", "MB", "loss"],
        [
            [
                str(row["devices"]),
                f"{row['median_ms']:.0f}",
                f"{row['cpu_ms']:.0f}",
                f"{row['cpu_ms'] / first['cpu_ms']:.2f}",
                ", ".join(f"{c['count']} {c['kind']}" for c in row["exchanges"]),
                f"{sum(c['bytes'] for c in row['exchanges']) / 1e6:.1f}",
                f"{row['loss']:.6f}",
            ]
            for row in rows.values()
        ],
    )
    print(f"Written: {flags.workdir}/devices.json")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", max(COUNTS))  # of a CPU, if it is one
    run_cli(main, parse(Benchmark(), __doc__))
