"""Eight devices do what one does, each an eighth of it, and pass on no activations."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from spikejax import encode, sharding
from spikejax.checksum import by_path
from spikejax.layers import LIF, MultiThreshold
from spikejax.losses import rate_cross_entropy
from spikejax.models.resnet import ResNet, ms, plain
from spikejax.neurons import cascade
from spikejax.norm import td_batch_norm
from spikejax.step import (
    TrainConfig,
    initial_state,
    make_eval_step,
    make_optimizer,
    make_predict,
    make_train_step,
)

pytestmark = pytest.mark.skipif(
    len(jax.devices()) != 8, reason="needs eight devices, virtual ones on a CPU"
)

ONE, EIGHT = sharding.data_mesh(jax.devices()[:1]), sharding.data_mesh()
BATCH, STEPS, CLASSES = 16, 5, 10
CONFIG = TrainConfig(steps=STEPS, batch_size=BATCH, learning_rate=0.3, warmup=0.4)


def batch_of(seed, size=8):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(BATCH, size, size, 3)).astype(np.float32),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
    }


def direct(time_steps):
    return lambda images, rng: encode.direct(images, time_steps)


def poisson(time_steps):
    return lambda images, rng: encode.poisson(images, time_steps, rng=rng)


def norm(features, *, rngs, alpha=1.0):
    """Without the zeros of membrane shortcuts, behind which gradients are small."""
    return td_batch_norm(features, rngs=rngs)


def resnet(**options):
    options = {"neuron": MultiThreshold, "residual": ms, "norm": norm} | options
    return ResNet((1,), (16,), CLASSES, stem_width=8, rngs=nnx.Rngs(0), **options)


class Folded(nnx.Module):
    """What not to do: it folds time and batch to [T * B, ...], time outside."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Linear(3, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.neurons = LIF()
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, xs):
        xs = self.neurons(self.stem(xs))
        batch, steps, *shape = xs.shape
        xs = self.conv(xs.swapaxes(0, 1).reshape(steps * batch, *shape))
        xs = self.neurons(xs.reshape(steps, batch, *shape).swapaxes(0, 1))
        return self.head(xs.mean((2, 3)))


class Run(NamedTuple):
    """Compiled steps of a model on a mesh, and the state before them."""

    mesh: Any
    state: Any
    train_step: Any
    eval_step: Any


def compiled(model, encode, mesh, size=8):
    """The steps as in ``fit``, compiled, for images of size x size."""
    optimizer = make_optimizer(CONFIG, STEPS)
    state = sharding.place_state(initial_state(model, optimizer, CONFIG), mesh)
    batch = sharding.place_batch(batch_of(0, size), mesh)
    weight = sharding.place_batch({"weight": np.ones(BATCH, np.float32)}, mesh)
    model.train()
    train_step = make_train_step(
        nnx.graphdef(model), rate_cross_entropy, encode, optimizer
    )
    model.eval()
    predict = make_predict(nnx.graphdef(model), encode)
    everywhere = sharding.replicated(mesh)
    train_step = jax.jit(
        train_step, donate_argnums=0, out_shardings=(everywhere, everywhere)
    )
    eval_step = jax.jit(make_eval_step(predict, rate_cross_entropy))
    return Run(
        mesh,
        state,
        train_step.lower(state, batch).compile(),
        eval_step.lower(state, batch | weight),
    )


SENT = (
    "all-gather",
    "all-to-all",
    "collective-permute",
    "all-reduce",
    "reduce-scatter",
)
INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(SENT)})(?:-start)?\(")


def sent(text):
    """(kind, elements) of every array that the devices of a program pass on."""
    found = []
    for shapes, kind in INSTRUCTION.findall(text):
        for shape in re.findall(r"\[([\d,]*)\]", re.sub(r"\{.*?\}", "", shapes)):
            found.append((kind, int(np.prod([int(n) for n in shape.split(",") if n]))))
    return found


def too_large(text, params):
    """What the devices pass on that is larger than the largest parameter."""
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    return [(kind, elements) for kind, elements in sent(text) if elements > largest]


@pytest.fixture(scope="module", params=[1, 4], ids=["T=1", "T=4"])
def runs(request):
    """The same small network, compiled on one device and on eight."""
    encode = direct(request.param)
    return [compiled(resnet(), encode, mesh) for mesh in (ONE, EIGHT)]


@pytest.fixture(scope="module")
def results(runs):
    """[(losses, first state, last state)] of five steps on one device and on eight."""
    results = []
    for run in runs:
        state, losses = sharding.place_state(run.state, run.mesh), []
        for seed in range(STEPS):
            batch = sharding.place_batch(batch_of(seed), run.mesh)
            state, metrics = run.train_step(state, batch)
            losses.append(float(metrics["loss"]))
        results.append((losses, run.state, state))
    return results


# Placing


def test_data_mesh_holds_all_devices_on_one_axis():
    assert EIGHT.axis_names == ("data",) and EIGHT.shape == {"data": 8}
    assert list(EIGHT.devices) == jax.devices()
    assert EIGHT.axis_types == (AxisType.Auto,)
    assert ONE.size == 1 and list(ONE.devices) == jax.devices()[:1]


def test_place_batch_cuts_the_first_axis():
    batch = batch_of(0)
    placed = sharding.place_batch(batch, EIGHT)
    assert set(placed) == set(batch)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.dtype == batch[name].dtype
        assert array.sharding.spec == PartitionSpec("data")
        for k, shard in enumerate(array.addressable_shards):
            assert shard.device == jax.devices()[k]
            np.testing.assert_array_equal(shard.data, batch[name][2 * k : 2 * k + 2])


def test_place_batch_refuses_a_batch_that_the_devices_cannot_share():
    with pytest.raises(ValueError, match="divi"):
        sharding.place_batch({"label": np.zeros(12, np.int32)}, EIGHT)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_place_state_gives_every_device_a_copy_of_its_own(mesh):
    weights = jnp.arange(6.0)
    state = {"params": weights, "ema": weights, "key": jax.random.key(1)}
    placed = sharding.place_state(state, mesh)
    assert placed["params"].is_fully_replicated
    assert len(placed["params"].addressable_shards) == mesh.size
    shards = [
        shard.data.unsafe_buffer_pointer()
        for array in (placed["params"], placed["ema"], weights)
        for shard in array.addressable_shards
    ]
    assert len(set(shards)) == 2 * mesh.size + 1  # else donation takes one twice
    after = jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0)(placed)
    assert placed["params"].is_deleted() and not weights.is_deleted()
    np.testing.assert_array_equal(after["ema"], weights)
    np.testing.assert_array_equal(weights, np.arange(6.0))


@pytest.mark.parametrize("size", [8, 16, 128])
def test_batch_sizes_that_the_devices_share(size):
    sharding.check_batch_size(size, EIGHT)
    sharding.check_batch_size(size - 1, ONE)


@pytest.mark.parametrize(
    ("size", "instead"), [(0, 8), (-8, 8), (3, 8), (12, 16), (9, 8), (127, 128)]
)
def test_other_batch_sizes_are_an_error_that_names_a_good_one(size, instead):
    message = (
        rf"batch size: expected a multiple of the 8 device\(s\), got {size}\. "
        rf"Take {instead}\."
    )
    with pytest.raises(ValueError, match=message):
        sharding.check_batch_size(size, EIGHT)
    sharding.check_batch_size(instead, EIGHT)


def test_a_batch_of_none_is_an_error_on_one_device_too():
    with pytest.raises(ValueError, match=r"got 0\. Take 1\."):
        sharding.check_batch_size(0, ONE)


# Eight devices equal one


def test_eight_devices_give_the_losses_of_one(results):
    (one, _, _), (eight, _, _) = results
    np.testing.assert_allclose(eight, one, atol=1e-5)
    assert max(one) - min(one) > 1e-2


def test_eight_devices_give_the_parameters_of_one(results):
    (_, first, one), (_, _, eight) = results
    first, one, eight = (by_path(state["params"]) for state in (first, one, eight))
    for path, leaf in one.items():
        np.testing.assert_allclose(eight[path], leaf, atol=1e-5, err_msg=path)
        assert np.abs(leaf - first[path]).max() > 1e-4, path


def test_eight_devices_give_the_statistics_of_one(results):
    (_, _, one), (_, _, eight) = results
    for path, leaf in by_path(one["rest"]).items():
        np.testing.assert_allclose(
            by_path(eight["rest"])[path], leaf, atol=1e-5, err_msg=path
        )


def test_the_state_stays_on_all_devices(results):
    for leaf in jax.tree.leaves(results[1][2]):
        assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == 8


def test_poisson_spikes_do_not_depend_on_the_devices():
    images = np.random.default_rng(0).uniform(size=(BATCH, 4)).astype(np.float32)
    draw = jax.jit(partial(encode.poisson, time_steps=4, rng=jax.random.key(5)))
    one, eight = (
        draw(**sharding.place_batch({"images": images}, mesh)) for mesh in (ONE, EIGHT)
    )
    np.testing.assert_array_equal(eight, one)


# What the devices pass on


def test_sent_reads_the_text_of_a_program():
    text = """
    %all-gather.3 = f32[16,4,8]{2,1,0} all-gather(%p), replica_groups=[1,8]<=[8]
    %ag = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(f32[2,8]{1,0} %p)
    %done = f32[16,8]{1,0} all-gather-done(%ag)
    ROOT %t = (f32[3]{0:T(128)}, s32[]) all-to-all(f32[3]{0} %a, s32[] %b)
    %all-reduce = f32[9,2]{1,0} all-reduce(%all-gather.3), to_apply=%add
    %x = f32[64]{0} add(%all-gather.3, %all-gather.3)
    """
    assert sent(text) == [
        ("all-gather", 512),
        ("all-gather", 16),
        ("all-gather", 128),
        ("all-to-all", 3),
        ("all-to-all", 1),
        ("all-reduce", 18),
    ]


def test_the_train_step_passes_on_nothing_larger_than_a_parameter(runs):
    run = runs[1]
    text = run.train_step.as_text()
    assert too_large(text, run.state["params"]) == []
    assert {kind for kind, _ in sent(text)} >= {"all-reduce"}  # of the gradients


def test_one_device_passes_on_nothing(runs):
    assert sent(runs[0].train_step.as_text()) == []


def test_the_evaluation_step_passes_on_two_sums(runs):
    found = sent(runs[1].eval_step.compile().as_text())
    assert found and set(found) == {("all-reduce", 1)}


def test_a_scan_over_time_passes_on_nothing_larger_than_a_parameter():
    """Longer than what is unrolled; with Poisson spikes, max-pooling, plain sums."""
    neuron = partial(MultiThreshold, 2, cascade)
    model = resnet(neuron=neuron, residual=plain, imagenet_stem=True)
    run = compiled(model, poisson(6), EIGHT, size=16)
    assert "while(" in run.train_step.as_text()
    assert too_large(run.train_step.as_text(), run.state["params"]) == []


def test_folding_time_outside_of_the_batch_is_found_out():
    run = compiled(Folded(), direct(4), EIGHT)
    found = too_large(run.train_step.as_text(), run.state["params"])
    assert {kind for kind, _ in found} & set(SENT[:3])


def test_each_of_eight_devices_needs_a_part_of_the_memory(runs):
    one, eight = (run.train_step.memory_analysis().temp_size_in_bytes for run in runs)
    assert 0 < eight <= one / 4
