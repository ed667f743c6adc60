"""Before one pays for a pod: does a step fit on a TPU slice, and how long does it take.

The TPU compiler (libtpu) compiles the step for chips that need not be there. Memory,
operations and traffic are its own account; the times are bounds, as no TPU has run.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from spikejax.tpu.chips import GIB, Slice, tpu_devices
from spikejax.tpu.collectives import Collective, collectives
from spikejax.tpu.traffic import cycles, hbm_bytes
from spikejax.train import sharding
from spikejax.train.loop import graphs, jit_train_step
from spikejax.train.recipe import TrainConfig, make_optimizer
from spikejax.train.step import Encode, Loss, initial_state

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What a training step takes on each chip of a slice; nan is not known.

    Bytes and operations are those of one chip and one step.
    """

    where: Slice
    batch_size: int
    """Images a step, over all chips."""
    train_images: float
    """Images of the whole training: epochs times the images of the set."""
    parameters: int
    optimizer: int
    inputs: int
    """Bytes of all that a step is given: parameters, optimiser, statistics, images."""
    outputs: int
    """Bytes of results that do not take the place of inputs."""
    temporaries: int
    """Bytes of activations, gradients and scratch, at the worst moment."""
    program: int
    """Bytes of the program itself."""
    flops: float
    bytes_accessed: float
    """Of all arrays that instructions take and give, on the chip or not."""
    hbm_bytes: float
    """Of those that lie in memory."""
    cycles: int
    """Of the clock, by the compiler's model; 0 is not known."""
    collectives: tuple[Collective, ...]
    loops: int
    """Loops in the program; the compiler counts the body of each once only."""

    @property
    def others(self) -> int:
        """Bytes of the inputs that are neither parameters nor optimiser."""
        return self.inputs - self.parameters - self.optimizer

    @property
    def peak(self) -> int:
        """Bytes of HBM that a chip needs."""
        return self.inputs + self.outputs + self.temporaries + self.program

    @property
    def fits(self) -> bool:
        """Whether a chip has so much."""
        return self.peak <= self.where.chip.hbm

    @property
    def compute_seconds(self) -> float:
        """Time of a step if the matrix units were always busy."""
        return self.flops / self.where.chip.flops

    @property
    def memory_seconds(self) -> float:
        """Time of a step if the memory were always busy."""
        return self.hbm_bytes / self.where.chip.hbm_bandwidth

    @property
    def network_seconds(self) -> float:
        """Time of a step if all links of a chip were always busy, without latency."""
        if math.isnan(self.flops):
            return math.nan
        sent = sum(operation.sent for operation in self.collectives)
        return sent / self.where.bandwidth if sent else 0.0

    @property
    def seconds(self) -> float:
        """Bound of a step: the longest of the three, as if they overlapped fully.

        Reference: the roofline, Williams et al. 2009, doi:10.1145/1498765.1498785.
        """
        times = self.compute_seconds, self.memory_seconds, self.network_seconds
        return math.nan if math.isnan(sum(times)) else max(times)

    @property
    def images_per_second(self) -> float:
        """Bound of the whole slice."""
        return self.batch_size / self.seconds

    @property
    def hours(self) -> float:
        """Bound of the whole training, without evaluation, saving and start."""
        return self.train_images / self.images_per_second / 3600

    @property
    def chip_hours(self) -> float:
        """What is paid for."""
        return self.hours * self.where.chips


def make_plan(
    train_step: Any, state: Any, batch: Any, where: Slice, *, train_images: float
) -> Plan:
    """Compile a training step and read off what it takes.

    Args:
        train_step: jitted (state, batch) -> (state, metrics); state should be donated.
        state: dict with 'params', 'opt' and more, its leaves jax.ShapeDtypeStruct with
            shardings over the devices of the slice (``tpu_devices``).
        batch: dict of such, 'image' and 'label' with all images of a step.
        where: the slice.
        train_images: epochs times the images of the training set.
    """
    given: dict[str, Any] = {
        "where": where,
        "batch_size": batch["label"].shape[0],
        "train_images": train_images,
        "parameters": bytes_a_device(state["params"]),
        "optimizer": bytes_a_device(state["opt"]),
    }
    try:
        compiled = train_step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        return Plan(
            **given,
            inputs=bytes_a_device((state, batch)),
            outputs=0,
            temporaries=needed,
            program=0,
            flops=math.nan,
            bytes_accessed=math.nan,
            hbm_bytes=math.nan,
            cycles=0,
            collectives=(),
            loops=0,
        )
    memory, cost, hlo = (
        compiled.memory_analysis(),
        compiled.cost_analysis(),
        compiled.as_text(),
    )
    return Plan(
        **given,
        inputs=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
        flops=cost["flops"],
        bytes_accessed=cost["bytes accessed"],
        hbm_bytes=hbm_bytes(hlo),
        cycles=cycles(hlo),
        collectives=collectives(hlo),
        loops=len(re.findall(r" while\(", hlo)),
    )


def plan_training(
    config: TrainConfig,
    build: Callable[[], nnx.Module],
    loss: Loss,
    encode: Encode,
    where: Slice,
    *,
    image_shape: tuple[int, ...],
    train_images: float,
    fsdp: int = 1,
    devices: Sequence[Any] | None = None,
) -> Plan:
    """The plan of what ``spikejax.train.fit`` would run; no array is made.

    Args:
        config, loss, encode: as ``fit`` takes them.
        build: makes the model.
        where: the slice.
        image_shape: [H, W, C] of an image, of 8 bits.
        train_images: epochs times the images of the training set.
        fsdp: devices that share one copy of the parameters.
        devices: to compile for, those of the slice by default.
    """
    devices = tpu_devices(where) if devices is None else devices
    mesh = sharding.data_mesh(devices, fsdp)
    sharding.check_batch_size(config.batch_size, mesh)
    optimizer = make_optimizer(config, max(1, int(train_images / config.batch_size)))
    state = jax.eval_shape(lambda: initial_state(build(), optimizer, config))
    graphdef, _ = graphs(nnx.eval_shape(build))
    step = jit_train_step(config, graphdef, loss, encode, optimizer, state, mesh)
    over_batch = sharding.over_batch(mesh)

    def lying(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    state = jax.tree.map(lying, state, sharding.state_shardings(state, mesh))
    images = jax.ShapeDtypeStruct((config.batch_size, *image_shape), "uint8")
    labels = jax.ShapeDtypeStruct((config.batch_size,), "int32")
    batch = {"image": lying(images, over_batch), "label": lying(labels, over_batch)}
    return make_plan(step, state, batch, where, train_images=train_images)


def bytes_a_device(tree: Any) -> int:
    """Bytes of the leaves on one device; abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def out_of_memory(message: str) -> int | None:
    """Bytes of temporaries that the TPU compiler asked for in vain, if it did."""
    said = re.search(
        r"memory required for HLO temporaries \(([\d.]+)([KMG])\)", message
    )
    if not said:
        return None
    return round(float(said[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30}[said[2]])


def batch_that_fits(plan: Plan) -> int:
    """Largest batch, a multiple of the chips, if temporaries grow with the batch; or 0.

    An estimate with 5 % of the memory to spare: compile to be sure.
    """
    fixed = plan.inputs + plan.outputs + plan.program
    part = (0.95 * plan.where.chip.hbm - fixed) / max(1, plan.temporaries)
    images = plan.batch_size // plan.where.chips
    return max(0, math.floor(min(1.0, part) * images)) * plan.where.chips


def verdict(plan: Plan) -> str:
    """One line: it fits, or how much it needs."""
    chip = plan.where.chip
    word = "fits" if plan.fits else "does not fit"
    needs = (
        f"{plan.peak / GIB:.2f} GiB of the {chip.hbm / GIB:.2f} GiB of a {chip.name}"
    )
    return f"{word}: {needs}"


def remedies(attempts: Mapping[str, Callable[[], Plan]]) -> Iterator[str]:
    """Lines that say whether a changed step fits; each is compiled for it.

    Args:
        attempts: {flags that make the change: compiles the changed step}.
    """
    for flags, attempt in attempts.items():
        yield f"with {flags} it {verdict(attempt())}"


def rows(plans: Mapping[str, Plan]) -> list[list[str]]:
    """Rows of a table with one column a plan, all of one chip; label and unit first."""
    listed = plans.values()
    chip = next(iter(listed)).where.chip
    kinds = sorted({c.kind for plan in listed for c in plan.collectives})

    def row(label, value, pattern=",.2f"):
        values = [value(plan) for plan in listed]
        return [label, *("-" if v != v else format(v, pattern) for v in values)]

    def exchanged(kind):
        def data(plan):
            of_kind = [c for c in plan.collectives if c.kind == kind]
            count, size = sum(c.count for c in of_kind), sum(c.bytes for c in of_kind)
            return f"{count} x, {size / 1e6:,.1f}"

        return row(f"{kind}, MB", data, "")

    def bound(plan):
        times = {
            "compute": plan.compute_seconds,
            "memory": plan.memory_seconds,
            "network": plan.network_seconds,
        }
        return "-" if math.isnan(plan.seconds) else max(times, key=lambda k: times[k])

    loops = row("loops, the body counted once", lambda p: p.loops, "")
    return [
        row("images a chip", lambda p: p.batch_size / p.where.chips, ",.0f"),
        row("parameters, MiB", lambda p: p.parameters / MIB, ",.1f"),
        row("optimiser, MiB", lambda p: p.optimizer / MIB, ",.1f"),
        row("statistics and images, MiB", lambda p: p.others / MIB, ",.1f"),
        row("activations and scratch, MiB", lambda p: p.temporaries / MIB, ",.1f"),
        row("program, MiB", lambda p: p.program / MIB, ",.1f"),
        row(f"peak of {chip.hbm / GIB:.2f} GiB HBM, GiB", lambda p: p.peak / GIB),
        row("fits", lambda p: "yes" if p.fits else "no", ""),
        row("operations, GFLOP", lambda p: p.flops / 1e9, ",.1f"),
        row("bytes accessed, GB", lambda p: p.bytes_accessed / 1e9),
        row("those in HBM, GB", lambda p: p.hbm_bytes / 1e9),
        *([loops] if any(plan.loops for plan in listed) else []),
        *map(exchanged, kinds),
        row("compute, ms", lambda p: 1e3 * p.compute_seconds),
        row("memory, ms", lambda p: 1e3 * p.memory_seconds),
        row("network, ms", lambda p: 1e3 * p.network_seconds),
        row("bound by", bound, ""),
        row("cycles by the compiler's model, million", lambda p: p.cycles / 1e6),
        row("images/s of the slice, at most", lambda p: p.images_per_second, ",.0f"),
        row("hours of training, at least", lambda p: p.hours),
        row("chip-hours, at least", lambda p: p.chip_hours, ",.1f"),
    ]
