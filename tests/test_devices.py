"""A training step on many devices does what one does, and passes on no activations."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import encode
from spikejax.layers import LIF, MultiThreshold
from spikejax.losses import rate_cross_entropy
from spikejax.models.resnet import ResNet, ms, plain
from spikejax.neurons import cascade
from spikejax.nn.norm import td_batch_norm
from spikejax.tpu.hlo import ARRAY, OPERATION
from spikejax.tpu.plan import bytes_per_device
from spikejax.train import TrainConfig, make_optimizer, sharding
from spikejax.train.checksum import by_path
from spikejax.train.loop import graphs, jit_train_step
from spikejax.train.step import initial_state, make_eval_step, make_predict

pytestmark = pytest.mark.skipif(
    len(jax.devices()) != 8, reason="needs eight devices, virtual ones on a CPU"
)

ONE, EIGHT = sharding.data_mesh(jax.devices()[:1]), sharding.data_mesh()
GRID, FSDP = sharding.data_mesh(fsdp=4), sharding.data_mesh(fsdp=8)
SEVERAL = {"8x1": EIGHT, "2x4": GRID, "1x8": FSDP}
BATCH, STEPS, CLASSES = 16, 10, 10
RECIPE = {"steps": STEPS, "batch_size": BATCH, "learning_rate": 0.3, "warmup": 0.4}


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


def norm(features, *, alpha=1.0, **options):
    """Without the zeros of membrane shortcuts, behind which gradients are small."""
    return td_batch_norm(features, **options)


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
    """The compiled training step of a model on a mesh, and the state before it."""

    mesh: Any
    state: Any
    train_step: Any
    evaluation: Any  # the model without its arrays

    def text(self):
        return self.train_step.as_text()


def compiled(model, encode, mesh, size=8, norm_groups=1):
    """The step as in ``fit``, compiled, for images of size x size."""
    config = TrainConfig(**RECIPE, norm_groups=norm_groups)
    optimizer = make_optimizer(config, STEPS)
    state = sharding.place_state(initial_state(model, optimizer, config), mesh)
    batch = sharding.shard_batch(batch_of(0, size), mesh)
    training, evaluation = graphs(model)
    step = jit_train_step(
        config, training, rate_cross_entropy, encode, optimizer, state, mesh
    )
    return Run(mesh, state, step.lower(state, batch).compile(), evaluation)


def train(run, steps=STEPS):
    """(losses, first state, last state)"""
    state, losses = sharding.place_state(run.state, run.mesh), []
    for seed in range(steps):
        batch = sharding.shard_batch(batch_of(seed), run.mesh)
        state, metrics = run.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, run.state, state


def sent(text):
    """(kind, elements) of every array that the devices of a program pass on."""
    return [
        (operation["kind"], math.prod(int(n) for n in array["shape"].split(",") if n))
        for operation in OPERATION.finditer(text)
        for array in ARRAY.finditer(operation["type"])
    ]


def too_large(run):
    """What the devices pass on that is larger than the largest parameter."""
    largest = max(leaf.size for leaf in jax.tree.leaves(run.state["params"]))
    return [(kind, size) for kind, size in sent(run.text()) if size > largest]


@pytest.fixture(scope="module", params=[1, 4], ids=["T=1", "T=4"])
def runs(request):
    """The same small network, compiled on one device and on eight."""
    encode = direct(request.param)
    meshes = {"one": ONE} | SEVERAL
    if request.param > 1:
        del meshes["1x8"]
    return {name: compiled(resnet(), encode, mesh) for name, mesh in meshes.items()}


@pytest.fixture(scope="module")
def results(runs):
    """{mesh: (losses, first state, last state)} of ten steps."""
    return {name: train(run) for name, run in runs.items()}


# Many devices equal one


def others(found):
    """(name, result) of all meshes but that of one device."""
    return [(name, value) for name, value in found.items() if name != "one"]


def test_every_mesh_gives_what_one_device_gives(results):
    losses, first, one = results["one"]
    assert max(losses) - min(losses) > 1e-2
    before, after = by_path(first["params"]), by_path(one["params"])
    assert all(np.abs(after[path] - before[path]).max() > 1e-4 for path in after)
    for name, (found, _, last) in others(results):
        np.testing.assert_allclose(found, losses, atol=1e-5, err_msg=name)
        for part in ("params", "rest"):
            leaves = by_path(last[part])
            for path, leaf in by_path(one[part]).items():
                np.testing.assert_allclose(
                    leaves[path], leaf, atol=1e-5, err_msg=f"{name} {path}"
                )


def test_the_state_stays_where_the_rule_puts_it(results, runs):
    for name, (_, _, last) in others(results):
        places = sharding.state_shardings(last, runs[name].mesh)
        for leaf, place in zip(
            jax.tree.leaves(last), jax.tree.leaves(places), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            assert len(leaf.sharding.device_set) == 8


def test_poisson_spikes_do_not_depend_on_the_devices():
    images = np.random.default_rng(0).uniform(size=(BATCH, 4)).astype(np.float32)
    draw = jax.jit(partial(encode.poisson, time_steps=4, rng=jax.random.key(5)))
    one, eight = (
        draw(**sharding.shard_batch({"images": images}, mesh)) for mesh in (ONE, EIGHT)
    )
    np.testing.assert_array_equal(eight, one)


# What the devices pass on


def test_the_train_step_passes_on_nothing_larger_than_a_parameter(runs):
    assert sent(runs["one"].text()) == []
    for name, run in others(runs):
        assert too_large(run) == [], name
        kinds = {kind for kind, _ in sent(run.text())}
        assert "all-reduce" in kinds  # of the gradients
        assert ("all-gather" in kinds) == (run.mesh.shape["fsdp"] > 1), name


def test_each_kernel_is_gathered_by_itself_and_once(runs):
    run = runs["2x4"]
    leaves = jax.tree.leaves(run.state["params"])
    kernels = [leaf.size for leaf in leaves if not leaf.is_fully_replicated]
    gathered = [size for kind, size in sent(run.text()) if kind == "all-gather"]
    assert sorted(gathered) == sorted(kernels) and len(kernels) == 5


def test_each_device_needs_its_part_of_the_memory(runs):
    """Arguments of the compiled step are the state and the batch, as they lie."""
    for name, run in runs.items():
        batch = sharding.shard_batch(batch_of(0), run.mesh)
        given = run.state | {"key": jnp.zeros(2)}, batch
        slack = 64 * len(jax.tree.leaves(given))
        memory = run.train_step.memory_analysis()
        most = 1.1 * bytes_per_device(given) + slack
        assert memory.argument_size_in_bytes <= most, name
        assert memory.alias_size_in_bytes > 0  # the new state takes the old one's place
    kernels = 3 * 3 * (3 * 8 + 8 * 16 + 16 * 16) + 8 * 16 + 16 * CLASSES
    one, eight, grid = (
        runs[name].train_step.memory_analysis() for name in ("one", "8x1", "2x4")
    )
    less = eight.argument_size_in_bytes - grid.argument_size_in_bytes
    assert less == pytest.approx(2 * 4 * kernels * 3 / 4, rel=0.02)
    assert 0 < eight.temp_size_in_bytes <= one.temp_size_in_bytes / 4


def test_the_evaluation_step_passes_on_three_sums(runs):
    run, rows = runs["8x1"], {"weight": np.ones(BATCH, np.float32)} | batch_of(0)
    predict = make_predict(run.evaluation, direct(4), sharding.replicate(run.mesh))
    step = jax.jit(
        make_eval_step(predict, rate_cross_entropy),
        out_shardings=sharding.replicated(run.mesh),
    )
    lowered = step.lower(run.state, sharding.shard_batch(rows, run.mesh))
    found = sent(lowered.compile().as_text())
    assert found and set(found) == {("all-reduce", 1)}


def test_a_scan_over_time_passes_on_nothing_larger_than_a_parameter():
    """Longer than what is unrolled; with Poisson spikes, max-pooling, plain sums."""
    neuron = partial(MultiThreshold, 2, cascade)
    model = resnet(neuron=neuron, residual=plain, imagenet_stem=True)
    run = compiled(model, poisson(6), EIGHT, size=16)
    assert "while(" in run.text()
    assert too_large(run) == []


def test_folding_time_outside_of_the_batch_is_found_out():
    found = {kind for kind, _ in too_large(compiled(Folded(), direct(4), EIGHT))}
    assert found & {"all-gather", "all-to-all", "collective-permute"}


# Batch statistics of parts of the batch


class Normed(nnx.Module):
    """Statistics, neurons and a head, so that a step compiles quickly."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = td_batch_norm(3, rngs=rngs)
        self.neurons = LIF()
        self.head = nnx.Linear(3, CLASSES, rngs=rngs)

    def __call__(self, xs):
        return self.head(self.neurons(self.norm(xs)).mean((2, 3)))


@pytest.fixture(scope="module")
def grouped():
    """{mesh: Run} with a group of the batch for each device."""
    return {
        name: compiled(Normed(), direct(2), mesh, norm_groups=8)
        for name, mesh in {"one": ONE, "8x1": EIGHT}.items()
    }


def test_groups_are_normalised_apart(grouped):
    batch = batch_of(0)

    def loss(start, size):
        """Of a part of the batch, and the variance that the layer then keeps."""
        model, rows = Normed(), slice(start, start + size)
        model.train()
        logits = model(direct(2)(jnp.asarray(batch["image"][rows]), None))
        mean = rate_cross_entropy(logits, batch["label"][rows]).mean()
        return float(mean), np.asarray(model.norm.var[...])

    losses, variances = zip(*(loss(k, 2) for k in range(0, BATCH, 2)), strict=True)
    assert abs(np.mean(losses) - loss(0, BATCH)[0]) > 1e-4
    for run in grouped.values():
        (found,), _, last = train(run, 1)
        assert found == pytest.approx(np.mean(losses), abs=1e-6)
        kept = last["rest"]["norm"]["var"]
        np.testing.assert_allclose(kept, np.mean(variances, 0), rtol=1e-5)


def test_groups_do_not_depend_on_the_devices(grouped):
    (one, _, state), (eight, _, other) = (train(run) for run in grouped.values())
    np.testing.assert_allclose(eight, one, atol=1e-5)
    for path, leaf in by_path(state["params"]).items():
        np.testing.assert_allclose(by_path(other["params"])[path], leaf, atol=1e-5)


def test_groups_need_no_word_between_devices_in_the_forward_pass(grouped):
    whole = compiled(Normed(), direct(2), EIGHT)
    apart, together = (
        len(OPERATION.findall(run.text())) for run in (grouped["8x1"], whole)
    )
    assert apart == 1 < together  # all sums are sent at the end
