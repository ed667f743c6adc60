"""Check on a machine, before it is paid for long, what a training there relies on.

    python -m experiments.selfcheck
    python -m experiments.selfcheck --topology v5e:2x4 --batch-size 512
    python -m experiments.selfcheck --model resnet20 --image-size 32 --dtype float32

Takes flags of experiments.imagenet but those of the data, as it shows random images;
those of the length of a training have no effect, as it runs a few steps. It compiles
the step, times it, saves and restores a checkpoint, and prints pass or fail for each
thing that a run needs. Exits with code 1 if one fails. On a pod start it on every
machine, as a training (docs/tpu.md).
"""

import copy
import dataclasses
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Compiled

from spikejax.data.images import PHOTOGRAPHS
from spikejax.encode import normalised
from spikejax.experiment import (
    Experiment,
    ImageSize,
    MultiThresholdOptions,
    ResNetOptions,
    VGGOptions,
)
from spikejax.experiment.build import build_model
from spikejax.experiment.cli import fail, flatten, parse, run_cli
from spikejax.experiment.config import make_loss
from spikejax.tpu.chips import GIB, Device, find_slice
from spikejax.tpu.hlo import collectives
from spikejax.tpu.plan import memory_of, read_plan
from spikejax.train import TrainConfig, processes, sharding, workdir
from spikejax.train.checkpoint import Checkpoints
from spikejax.train.checksum import parameters_sha256
from spikejax.train.loop import graphs, jit_train_step
from spikejax.train.recipe import make_optimizer
from spikejax.train.step import initial_state

CLASSES = 1000
STEPS = 10  # that are timed
CLOSE = 0.01  # difference of gradients, as a part of their norm
# Of the bound of the plan, in which one part of the chip works without a pause. By the
# compiler's own model a step of a ResNet-34 takes 2.4 times that.
SLOWEST = 5.0


@dataclasses.dataclass(frozen=True)
class Selfcheck:
    """The run that is to be checked."""

    experiment: Experiment = Experiment(
        workdir=Path("runs/selfcheck"),
        inputs=ImageSize(),
        network=ResNetOptions("resnet34", dtype="bfloat16"),
        train=TrainConfig(batch_size=1024),
    )
    """The run, by default mt-resnet34 of experiments.imagenet."""
    topology: str | None = None
    """Slice of a TPU, such as v5e:2x4: checks the number of chips and the time."""


DEFAULT = Selfcheck()


class Row(NamedTuple):
    """Line of the output: a thing that was checked."""

    what: str
    found: str
    passed: bool


def check(flags: Selfcheck) -> Iterator[Row]:
    """Yield a row for each thing that a training relies on."""
    experiment = flags.experiment
    mesh = sharding.data_mesh(fsdp=experiment.fsdp)
    sharding.check_batch_size(experiment.train.batch_size, mesh)
    yield check_devices(flags.topology)
    yield check_numbers()
    images = _Images(experiment, mesh)
    state, step = make_step(experiment, mesh)
    batch = next(images)
    compiled = cast(Any, step).lower(state, batch).compile()
    yield check_communication(str(compiled.as_text()), mesh)
    yield check_memory(compiled, jax.local_devices()[0].memory_stats() or {})
    # A compiled step takes its own result again only if types and shardings are kept.
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        try:
            state, metrics = compiled(state, batch)
            jax.block_until_ready((state, metrics))
        except jax.errors.JaxRuntimeError as error:  # such as too little memory
            yield Row("a step runs", str(error).splitlines()[0][:120], False)
            return
        seconds.append(time.perf_counter() - start)
    loss = float(metrics["loss"])
    yield Row("the loss is a number", f"{loss:.3f}", bool(np.isfinite(loss)))
    plan = None
    if flags.topology is not None:
        target = find_slice(flags.topology)
        plan = read_plan(compiled, state, batch, target, train_images=1.0).seconds
    size = experiment.train.batch_size
    yield check_time(statistics.median(seconds[1:]), plan, size)
    yield check_copies(state["params"])
    yield (shared := check_folder(experiment.workdir))
    if shared.passed:  # else a checkpoint would wait for the others forever
        yield check_resume(experiment.workdir, compiled, state, images)


def check_devices(topology: str | None) -> Row:
    """Check that all devices are of one kind, and as many as the slice has."""
    kinds = Counter(device.device_kind for device in jax.devices())
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    text += f", {jax.process_count()} process(es)"
    expected = find_slice(topology).chips if topology else len(jax.devices())
    passed = len(kinds) == 1 and len(jax.devices()) == expected
    return Row("devices", text, passed)


def check_numbers() -> Row:
    """Compare gradients of a small network on this device and on the CPU.

    Here with the layers that its platform takes, there with those of Flax.
    """

    def gradients(device: Device, platform: str | None) -> list[np.ndarray]:
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            model = build_model(
                VGGOptions("convnet"),
                MultiThresholdOptions(),
                num_classes=10,
                in_channels=3,
                seed=0,
                platform=platform,
            )
            graphdef, params, rest = nnx.split(model, nnx.Param, ...)
            # Halves and quarters are the same numbers everywhere.
            raw = np.random.default_rng(0).integers(0, 9, (8, 3, 8, 8, 3)) / 4
            xs = jnp.asarray(raw, jnp.float32)

            @jax.jit
            @jax.grad
            def gradient(params: dict, rest: dict) -> jax.Array:
                logits = nnx.merge(graphdef, params, rest)(xs)
                return (logits * jnp.arange(10.0)).mean()

            found = gradient(*map(nnx.to_pure_dict, (params, rest)))
            return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]

    here = gradients(jax.local_devices()[0], None)
    # "gpu": no kernels of ours.
    there = gradients(jax.local_devices(backend="cpu")[0], "gpu")
    norm = sum((b**2).sum() for b in there) ** 0.5
    apart = sum(((a - b) ** 2).sum() for a, b in zip(here, there, strict=True)) ** 0.5
    text = f"{apart / norm:.1e} apart, at most {CLOSE}"
    return Row("gradients are those of a CPU", text, bool(apart <= CLOSE * norm))


def make_step(experiment: Experiment, mesh: Mesh) -> tuple[Any, Any]:
    """Return the state of a run, placed on the mesh, and its training step."""
    model = build_model(
        experiment.network,
        experiment.activation,
        num_classes=CLASSES,
        in_channels=3,
        seed=experiment.train.seed,
    )
    optimizer = make_optimizer(experiment.train, 1000)
    state = initial_state(model, optimizer, experiment.train)
    state = sharding.place_state(state, mesh)
    encode = normalised(*PHOTOGRAPHS, experiment.time_steps)
    parts = graphs(model)[0], make_loss(experiment), encode, optimizer, state, mesh
    return state, jit_train_step(experiment.train, *parts)


class _Images:
    """Random images of this process and their labels, a batch per step."""

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self.size = experiment.train.batch_size // jax.process_count()
        side = cast(ImageSize, experiment.inputs).image_size
        self.shape, self.mesh, self.step = (side, side, 3), mesh, 0

    def __next__(self) -> dict[str, jax.Array]:
        rng = np.random.default_rng((self.step, jax.process_index()))
        self.step += 1
        image = rng.integers(0, 256, (self.size, *self.shape), np.uint8)
        label = rng.integers(0, CLASSES, self.size, np.int32)
        return sharding.shard_batch({"image": image, "label": label}, self.mesh)

    def get_state(self) -> int:
        return self.step

    def set_state(self, state: int) -> None:
        self.step = state


def check_communication(hlo: str, mesh: Mesh) -> Row:
    """Check that devices exchange sums alone, and parameters where these are sharded.

    A gather of activations would take longer than all else.
    """
    found = collectives(hlo)
    allowed = {"all-reduce"}
    if mesh.shape["fsdp"] > 1:
        allowed |= {"all-gather", "reduce-scatter"}
    text = ", ".join(f"{c.count} {c.kind} of {c.bytes / 1e6:,.1f} MB" for c in found)
    return Row(
        "devices exchange", text or "nothing", {c.kind for c in found} <= allowed
    )


def check_memory(compiled: Compiled, stats: dict[str, int]) -> Row:
    """Check that the compiled step fits into the memory of a device, where known."""
    peak = sum(memory_of(compiled).values())
    limit = stats.get("bytes_limit")
    text = f"{peak / GIB:.2f} GiB" + (f" of {limit / GIB:.2f}" if limit else "")
    return Row("memory of a step", text, limit is None or peak <= limit)


def check_time(seconds: float, bound: float | None, batch_size: int) -> Row:
    """Compare the time of a step with the bound of the plan, if there is one."""
    text = f"{1000 * seconds:,.1f} ms, {batch_size / seconds:,.0f} images/s"
    if bound is None:
        return Row("time of a step", text, True)
    text += f", {seconds / bound:.1f} times the plan's bound, at most {SLOWEST}"
    # Faster than the bound is no good news: a step that was not waited for.
    return Row("time of a step", text, bound <= seconds <= SLOWEST * bound)


def check_copies(params: Any) -> Row:
    """Check that all copies of the parameters have the same bits after some steps."""
    copies, same = 0, True
    for leaf in jax.tree.leaves(params):
        parts: dict[str, list[np.ndarray]] = {}
        for part in leaf.addressable_shards:
            parts.setdefault(str(part.index), []).append(np.asarray(part.data))
        for first, *others in parts.values():
            copies = max(copies, 1 + len(others))
            same &= all(np.array_equal(first, other) for other in others)
    every = processes.all_gather(parameters_sha256(sharding.to_local_device(params)))
    text = f"{copies} here, {len(every)} process(es)"
    return Row(
        "copies of the parameters are equal", text, same and len(set(every)) == 1
    )


def check_folder(folder: Path) -> Row:
    """Check that all processes see a file that process 0 writes."""
    # A name that is new: none has looked for it, and no killed check has left it.
    path = folder / f"selfcheck-{processes.all_gather(time.time_ns())[0]}"
    workdir.write(path, {})
    found = f"{jax.process_count()} process(es)"
    try:
        workdir.check_shared(path)
        return Row("all see the folder", found, True)
    except ValueError as error:
        return Row("all see the folder", str(error), False)
    finally:
        if processes.is_primary():
            path.unlink()


def check_resume(folder: Path, compiled: Compiled, state: Any, images: _Images) -> Row:
    """Save, restore, and compare the next step of both, bit for bit."""
    folder = folder / "selfcheck-checkpoints"
    if processes.is_primary():
        shutil.rmtree(folder, ignore_errors=True)  # of a check that was killed
    processes.all_gather("ready")
    start = time.perf_counter()
    saved = Checkpoints(folder)
    saved.save(1, state, images)
    saved.close()
    other = copy.copy(images)
    other.step = 0
    restored = Checkpoints(folder)
    _, found, _ = cast(Any, restored.restore(state, other))
    restored.close()
    seconds = time.perf_counter() - start
    both = [(state, images), (found, other)]
    after = [compiled(values, next(batches))[0] for values, batches in both]
    sums = [parameters_sha256(sharding.to_local_device(s["params"])) for s in after]
    processes.all_gather("read")
    if processes.is_primary():
        shutil.rmtree(folder)
    text = f"saved and restored in {seconds:.1f} s"
    return Row("resumes bit for bit", text, len(set(sums)) == 1)


def main(flags: Selfcheck) -> None:
    """Check, print a line for each, and exit with code 1 if something failed."""
    with processes.distributed(flags.experiment.processes, flatten(flags)):
        failed, (index, count) = [], processes.shard()
        for row in check(flags):
            failed += [] if row.passed else [row.what]
            verdict = "pass" if row.passed else "FAIL"
            where = "" if row.passed or count == 1 else f"process {index}: "
            if index == 0 or not row.passed:  # a check may fail in one of them alone
                print(f"{verdict}  {where}{row.what}: {row.found}", flush=True)
    if failed:
        fail(f"selfcheck: failed: {', '.join(failed)}.")


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
