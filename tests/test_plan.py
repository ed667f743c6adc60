import importlib.util
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from spikejax import LIF, encode, losses
from spikejax.models.vgg import VGG
from spikejax.tpu.chips import GIB, find_slice, tpu_devices
from spikejax.tpu.hlo import Collective
from spikejax.tpu.plan import (
    Plan,
    batch_that_fits,
    make_plan,
    out_of_memory,
    plan_training,
    rows,
    verdict,
)
from spikejax.train import TrainConfig
from spikejax.train.sharding import batch_sharding, data_mesh, replicated

EIGHT = find_slice("v5e:2x4")
TOO_LARGE = (  # libtpu 0.0.42.1 for v5e
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (33.06G) exceeds available HBM (15.75G)."
)

# 100 ms of compute, 500 ms of memory and 120 ms of network on v5e:2x4, whose corner
# chips have two links: 2 x 7/8 x 8 GB are sent at 2 x 50 GB/s, and 20 GB x 0.5 / 50.
GIVEN = Plan(
    target=EIGHT,
    batch_size=512,
    train_images=3686400,
    parameters=2 * GIB,
    optimizer=2 * GIB,
    inputs=5 * GIB,
    outputs=GIB,
    temporaries=6 * GIB,
    program=GIB,
    flops=19.7e12,
    bytes_accessed=819e9,
    hbm_bytes=409.5e9,
    cycles=150 * 10**6,
    collectives=(
        Collective("all-reduce", 8, 3, 4 * 10**9),
        Collective("all-gather", 2, 1, 10**10),
    ),
    loops=0,
)


def abstract(tree, sharding):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
    )


def perceptron(batch_size=64, parameters=None):
    """A step of w [16, 32] with momentum, and its abstract arguments on 8 devices."""
    mesh = data_mesh()

    def step(state, batch):
        def loss(params):
            return 0.5 * ((batch["image"] @ params["w"]) ** 2).sum()

        gradient = jax.grad(loss)(state["params"])
        opt = jax.tree.map(lambda m, g: 0.9 * m + g, state["opt"], gradient)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], opt)
        return {"params": params, "opt": opt}, {}

    where = parameters or replicated(mesh)
    w = abstract({"w": jnp.zeros((16, 32))}, where)
    batch = {"image": jnp.zeros((batch_size, 16)), "label": jnp.zeros(batch_size)}
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    return jitted, {"params": w, "opt": w}, abstract(batch, batch_sharding(mesh))


def test_counts_of_a_step_by_hand():
    step, state, batch = perceptron()
    plan = make_plan(step, state, batch, EIGHT, train_images=1000.0)
    size, images = 16 * 32, 8  # parameters; images a chip
    forward = backward = 2 * images * size
    update = 4 * size  # 0.9 m + g and p - 0.1 m
    reduced = size  # the all-reduce adds once, by the compiler's rule
    square = 2 * images * 32  # 0.5 and 2 of the gradient, which older XLA multiplies
    extra = plan.flops - (forward + backward + update + reduced)
    assert extra in (0, square)
    assert plan.collectives == (Collective("all-reduce", 8, 1, 4 * size),)
    assert plan.parameters == plan.optimizer == 4 * size
    assert plan.inputs == 2 * 4 * size + 4 * images * 16  # labels are not used
    assert plan.outputs < 64  # the new parameters take the place of the old ones
    assert (plan.batch_size, plan.train_images, plan.loops) == (64, 1000.0, 0)
    assert plan.fits and plan.peak < GIB
    assert 4 * 4 * size < plan.hbm_bytes <= plan.bytes_accessed  # w and m, in and out


def test_twice_the_images_are_twice_the_work_for_the_same_network():
    one = make_plan(*perceptron(64), EIGHT, train_images=1.0)
    two = make_plan(*perceptron(128), EIGHT, train_images=1.0)
    size = 16 * 32
    assert two.flops - one.flops - 2 * 2 * 8 * size in (0, 2 * 8 * 32)  # see above
    assert two.collectives == one.collectives


def test_sharded_parameters_take_their_share():
    sharded = NamedSharding(data_mesh(), PartitionSpec(("data", "fsdp")))
    plan = make_plan(*perceptron(parameters=sharded), EIGHT, train_images=1.0)
    assert plan.parameters == plan.optimizer == 4 * 16 * 32 // 8
    assert any(c.kind == "all-gather" for c in plan.collectives)


def spiking(fsdp=1, batch_size=16):
    """The plan of a small spiking network on 8 devices."""

    def network():
        return VGG((8, 128), num_classes=100, neuron=LIF, rngs=nnx.Rngs(0))

    plan = plan_training(
        TrainConfig(batch_size=batch_size),
        network,
        losses.rate_cross_entropy,
        lambda images, rng: encode.direct(images / 255.0, 1),
        EIGHT,
        image_shape=(8, 8, 3),
        train_images=1000.0,
        fsdp=fsdp,
        devices=jax.devices(),
    )
    return plan, nnx.state(nnx.eval_shape(network), nnx.Param)


def test_a_spiking_network_reduces_its_gradients_and_little_else():
    plan, params = spiking()
    (reduced,) = plan.collectives
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert plan.parameters == 4 * parameters
    assert 4 * parameters < plan.optimizer < 4 * (parameters + 8)  # momentum, counts
    others = plan.inputs - plan.parameters - plan.optimizer
    assert others < 4 * 3 * (8 + 128) + 2 * (8 * 8 * 3 + 4)  # norms; two images
    assert (reduced.kind, reduced.devices) == ("all-reduce", 8)
    # Norms: mean and mean square, and as many gradients; loss and accuracy.
    assert 4 * parameters < reduced.bytes <= 4 * (parameters + 4 * (8 + 128) + 2)
    assert plan.loops == 0 and plan.batch_size == 16


def test_a_network_whose_kernels_are_cut_in_eight():
    plan, params = spiking(fsdp=8)
    sizes = [leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    others = sum(leaf.size for leaf in jax.tree.leaves(params)) - sum(sizes)
    assert plan.parameters == 4 * (sum(sizes) // 8 + others)
    gathered = sum(c.bytes for c in plan.collectives if c.kind == "all-gather")
    assert gathered == 4 * sum(sizes)


def test_what_does_not_fit_the_mesh():
    with pytest.raises(ValueError, match=r"fsdp: expected a divisor of the 8 device"):
        spiking(fsdp=3)
    with pytest.raises(ValueError, match=r"multiple of the 8 device\(s\), got 20"):
        spiking(batch_size=20)


def test_loops_are_seen_as_their_body_counts_once():
    def step(state, batch):
        def forget(m, x):
            return 0.5 * m + x.sum(), None

        opt, _ = jax.lax.scan(forget, state["opt"], batch["image"])
        return state | {"opt": opt}, {}

    state = {"params": jnp.zeros(()), "opt": jnp.zeros(())}
    everywhere = replicated(data_mesh())
    batch = {"image": jnp.zeros((64, 16)), "label": jnp.zeros(64)}
    plan = make_plan(
        jax.jit(step),
        abstract(state, everywhere),
        abstract(batch, everywhere),
        EIGHT,
        train_images=1.0,
    )
    assert plan.loops == 1
    assert plan.flops < 2 * (16 + 2)


def test_roofline_by_hand():
    network = (7e9 + 5e9) / 100e9
    times = {"compute": 0.1, "memory": 0.5, "network": network}
    assert GIVEN.times == pytest.approx(times)
    assert GIVEN.seconds == GIVEN.times["memory"]
    assert GIVEN.hours == pytest.approx(1.0)  # 3,686,400 images, 1,024 per second
    alone = replace(GIVEN, target=find_slice("v5e:1x1"), collectives=())
    assert alone.times["network"] == 0.0


def test_memory_by_hand():
    assert GIVEN.peak == 13 * GIB and GIVEN.fits
    assert verdict(GIVEN) == "fits: 13.00 GiB of the 15.75 GiB of a v5e"
    large = replace(GIVEN, temporaries=9 * GIB)
    assert not large.fits
    assert verdict(large) == "does not fit: 16.00 GiB of the 15.75 GiB of a v5e"


def test_batch_that_fits():
    """7 GiB stay whatever the batch; of the rest 95 % of 15.75 GiB may be had."""
    large = replace(GIVEN, temporaries=32 * GIB)  # 64 images a chip, half a GiB each
    assert batch_that_fits(large) == math.floor((0.95 * 15.75 - 7) / 0.5) * 8
    assert batch_that_fits(GIVEN) == GIVEN.batch_size
    assert batch_that_fits(replace(GIVEN, inputs=16 * GIB)) == 0


class Refused:
    """A jitted step that the compiler does not take."""

    def __init__(self, message):
        self.message = message

    def lower(self, state, batch):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_what_the_compiler_refuses_does_not_fit():
    assert out_of_memory(TOO_LARGE) == round(33.06 * GIB)
    _, state, batch = perceptron()
    plan = make_plan(Refused(TOO_LARGE), state, batch, EIGHT, train_images=1.0)
    assert not plan.fits
    assert plan.peak == round(33.06 * GIB) + 2 * 2048 + 8 * 16 * 4 + 8 * 4
    assert math.isnan(plan.seconds) and math.isnan(plan.hours)
    table = dict(zip(*zip(*rows({"it": plan}), strict=True), strict=True))
    assert (table["fits"], table["bound by"], table["network, ms"]) == ("no", "-", "-")


def test_other_errors_of_the_compiler_are_passed_on():
    _, state, batch = perceptron()
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: oh"):
        make_plan(Refused("INTERNAL: oh"), state, batch, EIGHT, train_images=1.0)


def test_rows_side_by_side():
    other = replace(GIVEN, collectives=GIVEN.collectives[:1], flops=197e12, loops=2)
    table = {row[0]: row[1:] for row in rows({"one": GIVEN, "other": other})}
    assert table["images per chip"] == ["64", "64"]
    assert table["parameters, MiB"] == ["2,048.0", "2,048.0"]
    assert table["statistics and images, MiB"] == ["1,024.0", "1,024.0"]
    assert table["peak of 15.75 GiB HBM, GiB"] == ["13.00", "13.00"]
    assert table["operations, GFLOP"] == ["19,700.0", "197,000.0"]
    assert table["bytes accessed, GB"] == ["819.00", "819.00"]
    assert table["those in HBM, GB"] == ["409.50", "409.50"]
    assert table["cycles by the compiler's model, million"] == ["150.00", "150.00"]
    assert table["all-gather, MB"] == ["1 x, 10,000.0", "0 x, 0.0"]
    assert table["all-reduce, MB"] == ["3 x, 4,000.0", "3 x, 4,000.0"]
    assert table["network, ms"] == ["120.00", "70.00"]
    assert table["bound by"] == ["memory", "compute"]
    assert table["loops, the body counted once"] == ["0", "2"]
    assert table["images/s of the slice, at most"] == ["1,024", "512"]
    assert table["chip-hours, at least"] == ["8.0", "16.0"]
    assert "loops, the body counted once" not in {r[0] for r in rows({"one": GIVEN})}


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no TPU compiler: pip install -e '.[tpu]'",
)


@needs_libtpu
def test_the_tpu_compiler_counts_as_we_do():
    where = find_slice("v5e:2x2")
    devices = tpu_devices(where)
    assert len(devices) == 4
    mesh = data_mesh(devices)

    def planned(features):
        def step(state, batch):
            def loss(w):
                return 0.5 * ((batch["image"] @ w) ** 2).sum()

            w = state["params"]
            m = 0.9 * state["opt"] + jax.grad(loss)(w)
            return {"params": w - 0.1 * m, "opt": m}, {}

        w = abstract(jnp.zeros((512, 512)), replicated(mesh))
        rows = jax.ShapeDtypeStruct((features, 512), jnp.float32)
        batch = {"image": rows, "label": jax.ShapeDtypeStruct((features,), jnp.int32)}
        return make_plan(
            jax.jit(step, donate_argnums=0, out_shardings=(replicated(mesh), None)),
            {"params": w, "opt": w},
            abstract(batch, batch_sharding(mesh)),
            where,
            train_images=1.0,
        )

    plan = planned(4 * 128)
    assert plan.collectives == (Collective("all-reduce", 4, 1, 4 * 512 * 512),)
    assert plan.flops == pytest.approx(2 * 2 * 128 * 512 * 512, rel=0.03)
    assert plan.fits
    too_many = planned(4 * 2**23)  # a chip's share of the images alone is 16 GiB
    assert not too_many.fits and too_many.peak > 16 * GIB
