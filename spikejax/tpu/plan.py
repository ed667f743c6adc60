"""Check ahead of time if a training step fits on a TPU slice, and bound its time.

The TPU compiler (libtpu) compiles the step for chips that need not be there. Memory,
operations and traffic are its own account. Times are lower bounds, not measurements.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.stages import Compiled, Wrapped

from spikejax.tpu.chips import GIB, Device, Slice, tpu_devices
from spikejax.tpu.hlo import Collective, collectives, cycles, hbm_bytes
from spikejax.train import sharding
from spikejax.train.loop import graphs, jit_train_step
from spikejax.train.recipe import TrainConfig, make_optimizer
from spikejax.train.step import Encode, Loss, initial_state

MIB = 2**20

Tree = Any  # a pytree of jax.ShapeDtypeStruct with shardings


@dataclass(frozen=True)
class Plan:
    """Needs of a training step on each chip of a slice.

    Bytes and operations are per chip and step. They are nan, and cycles 0, if the
    compiler refused the step or does not report them.
    """

    target: Slice
    batch_size: int  # images per step, over all chips
    train_images: float  # of the whole training: epochs times the images of the set
    parameters: int
    optimizer: int
    inputs: int  # all arguments: parameters, optimiser, statistics, images
    temporaries: int  # activations, gradients and scratch at the worst moment
    outputs: int = 0  # results that are not written over donated arguments
    program: int = 0  # the executable itself
    flops: float = math.nan
    bytes_accessed: float = math.nan  # by all instructions, on the chip or not
    hbm_bytes: float = math.nan  # those of them that are in HBM
    cycles: int = 0  # of the clock, by the compiler's model
    collectives: tuple[Collective, ...] = ()
    loops: int = 0  # the compiler counts the body of each only once

    @property
    def peak(self) -> int:
        """Return the bytes of HBM that a chip needs."""
        return self.inputs + self.outputs + self.temporaries + self.program

    @property
    def fits(self) -> bool:
        """Tell if a chip has that much HBM."""
        return self.peak <= self.target.chip.hbm

    @property
    def times(self) -> dict[str, float]:
        """Return the seconds of a step if only one of the chip's parts were busy.

        The parts are the matrix units, the memory, and all links (without latency).
        """
        chip, sent = self.target.chip, sum(c.sent for c in self.collectives)
        network = sent / self.target.bandwidth if sent else 0.0  # one chip: no link
        return {
            "compute": self.flops / chip.flops,
            "memory": self.hbm_bytes / chip.hbm_bandwidth,
            "network": math.nan if math.isnan(self.flops) else network,
        }

    @property
    def seconds(self) -> float:
        """Return the least time of a step: the longest of the three, fully overlapped.

        Reference: the roofline, Williams et al. 2009, doi:10.1145/1498765.1498785.
        """
        times = self.times.values()
        return math.nan if math.isnan(sum(times)) else max(times)

    @property
    def hours(self) -> float:
        """Return the least time of the training, without evaluation, saving, start."""
        return self.train_images / self.batch_size * self.seconds / 3600


def make_plan(
    train_step: Wrapped, state: Tree, batch: Tree, target: Slice, *, train_images: float
) -> Plan:
    """Compile a training step and return its needs.

    Args:
        train_step: jitted (state, batch) -> (state, metrics); state should be donated.
        state: dict with 'params', 'opt' and more, its leaves jax.ShapeDtypeStruct with
            shardings over the devices of the slice (``tpu_devices``).
        batch: dict of such, 'image' and 'label' with all images of a step.
        target, train_images: as in `plan_training`.

    Raises:
        JaxRuntimeError: the compiler refused the step, not for lack of memory.
    """
    try:
        compiled: Any = train_step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler has no other way to say how much memory was missing.
        if (needed := out_of_memory(str(error))) is None:
            raise
        needs = {"inputs": bytes_per_device((state, batch)), "temporaries": needed}
        return _plan(state, batch, target, train_images, **needs)
    return read_plan(compiled, state, batch, target, train_images=train_images)


def read_plan(
    compiled: Compiled, state: Tree, batch: Tree, target: Slice, *, train_images: float
) -> Plan:
    """Return the needs of a compiled training step; arguments as in ``make_plan``."""
    cost: Any = compiled.cost_analysis()
    hlo = str(compiled.as_text())
    return _plan(
        *(state, batch, target, train_images),
        **memory_of(compiled),
        flops=cost["flops"],
        bytes_accessed=cost["bytes accessed"],
        hbm_bytes=hbm_bytes(hlo),
        cycles=cycles(hlo),
        collectives=collectives(hlo),
        loops=len(re.findall(r" while\(", hlo)),
    )


def memory_of(compiled: Compiled) -> dict[str, int]:
    """Return the bytes per device of a compiled function, as fields of ``Plan``."""
    memory: Any = compiled.memory_analysis()
    return {
        "inputs": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def _plan(
    state: Tree, batch: Tree, target: Slice, train_images: float, **needs: Any
) -> Plan:
    parameters, optimizer = map(bytes_per_device, (state["params"], state["opt"]))
    size = batch["label"].shape[0]
    return Plan(target, size, train_images, parameters, optimizer, **needs)


def plan_training(
    config: TrainConfig,
    build: Callable[[], nnx.Module],
    loss: Loss,
    encode: Encode,
    target: Slice,
    *,
    image_shape: tuple[int, ...],
    train_images: float,
    fsdp: int = 1,
    devices: Sequence[Device] | None = None,
) -> Plan:
    """Return the plan of the step that ``spikejax.train.fit`` would run.

    No array is made: the state is abstract.

    Args:
        config, loss, encode: as for ``fit``.
        build: makes the model.
        target: the slice.
        image_shape: [H, W, C] of an image, of 8 bits.
        train_images: epochs times the images of the training set.
        fsdp: devices that share one copy of the parameters.
        devices: devices to compile for, those of the slice by default.
    """
    devices = tpu_devices(target) if devices is None else devices
    mesh = sharding.data_mesh(devices, fsdp)
    sharding.check_batch_size(config.batch_size, mesh)
    optimizer = make_optimizer(config, max(1, int(train_images / config.batch_size)))
    state = jax.eval_shape(lambda: initial_state(build(), optimizer, config))
    graphdef, _ = graphs(nnx.eval_shape(build))
    step: Any = jit_train_step(config, graphdef, loss, encode, optimizer, state, mesh)
    places = sharding.state_shardings(state, mesh)
    state = jax.tree.map(lambda leaf, at: leaf.update(sharding=at), state, places)
    row = partial(jax.ShapeDtypeStruct, sharding=sharding.batch_sharding(mesh))
    size = config.batch_size
    batch = {
        "image": row((size, *image_shape), "uint8"),
        "label": row((size,), "int32"),
    }
    return make_plan(step, state, batch, target, train_images=train_images)


def bytes_per_device(tree: Tree) -> int:
    """Return the bytes of the leaves on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def out_of_memory(message: str) -> int | None:
    """Return the bytes of temporaries in the TPU compiler's error; None if no such."""
    needed = re.search(r"required for HLO temporaries \(([\d.]+)([KMG])\)", message)
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return round(float(needed[1]) * units[needed[2]]) if needed else None


def batch_that_fits(plan: Plan) -> int:
    """Return the largest batch that should fit, a multiple of the chips, or 0.

    An estimate: compile to be sure.
    """
    # Temporaries are taken to grow with the batch. 5 % of the memory is left over, as
    # the compiler's scheduling changes with the batch too.
    fixed = plan.inputs + plan.outputs + plan.program
    part = (0.95 * plan.target.chip.hbm - fixed) / max(1, plan.temporaries)
    images = plan.batch_size // plan.target.chips
    return max(0, math.floor(min(1.0, part) * images)) * plan.target.chips


def verdict(plan: Plan) -> str:
    """Return one line: it fits or not, and how much it needs."""
    chip, fits = plan.target.chip, "fits" if plan.fits else "does not fit"
    has = f"{chip.hbm / GIB:.2f} GiB of a {chip.name}"
    return f"{fits}: {plan.peak / GIB:.2f} GiB of the {has}"


Value = Callable[[Plan], float | str]  # of a row of the table


def rows(plans: Mapping[str, Plan]) -> list[list[str]]:
    """Return the rows of a table, label and unit first, then one column per plan.

    Args:
        plans: at least one plan by name, all of the same chip.
    """
    listed = list(plans.values())
    hbm = listed[0].target.chip.hbm / GIB
    kinds = sorted({c.kind for plan in listed for c in plan.collectives})

    def row(label: str, value: Value, pattern: str = ",.2f") -> list[str]:
        values = map(value, listed)
        return [label, *("-" if v != v else format(v, pattern) for v in values)]  # nan

    def exchanged(plan: Plan, kind: str) -> str:
        same = [c for c in plan.collectives if c.kind == kind]
        return (
            f"{sum(c.count for c in same)} x, {sum(c.bytes for c in same) / 1e6:,.1f}"
        )

    def bound(plan: Plan) -> str:
        times = plan.times
        return "-" if math.isnan(plan.seconds) else max(times, key=lambda k: times[k])

    def others(plan: Plan) -> float:
        return (plan.inputs - plan.parameters - plan.optimizer) / MIB

    def rate(plan: Plan) -> float:
        return plan.batch_size / plan.seconds

    loops = row("loops, the body counted once", lambda p: p.loops, "")
    return [
        row("images per chip", lambda p: p.batch_size / p.target.chips, ",.0f"),
        row("parameters, MiB", lambda p: p.parameters / MIB, ",.1f"),
        row("optimiser, MiB", lambda p: p.optimizer / MIB, ",.1f"),
        row("statistics and images, MiB", others, ",.1f"),
        row("activations and scratch, MiB", lambda p: p.temporaries / MIB, ",.1f"),
        row("program, MiB", lambda p: p.program / MIB, ",.1f"),
        row(f"peak of {hbm:.2f} GiB HBM, GiB", lambda p: p.peak / GIB),
        row("fits", lambda p: "yes" if p.fits else "no", ""),
        row("operations, GFLOP", lambda p: p.flops / 1e9, ",.1f"),
        row("bytes accessed, GB", lambda p: p.bytes_accessed / 1e9),
        row("those in HBM, GB", lambda p: p.hbm_bytes / 1e9),
        *([loops] if any(plan.loops for plan in listed) else []),
        *(row(f"{k}, MB", partial(exchanged, kind=k), "") for k in kinds),
        *(row(f"{k}, ms", lambda p, k=k: 1e3 * p.times[k]) for k in listed[0].times),
        row("bound by", bound, ""),
        row("cycles by the compiler's model, million", lambda p: p.cycles / 1e6),
        row("images/s of the slice, at most", rate, ",.0f"),
        row("hours of training, at least", lambda p: p.hours),
        row("chip-hours, at least", lambda p: p.hours * p.target.chips, ",.1f"),
    ]
