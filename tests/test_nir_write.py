"""Networks to NIR, against a reading of its text in numpy, channels-first."""

from functools import partial

import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest
from flax import nnx

from spikejax import neurons
from spikejax.conversion import calibrate, convert
from spikejax.layers import IF, LI, LIF, MultiThreshold, Neuron
from spikejax.models.resnet import ResNet, ms, plain, sew
from spikejax.models.vgg import POOL, VGG
from spikejax.models.whitened import WhitenedCNN
from spikejax.neurons import NeuronOptions, NeuronParams
from spikejax.nir.neurons import EXPONENTIAL, Dialect, loop, node
from spikejax.nir.read import from_nir
from spikejax.nir.write import to_nir
from spikejax.nn.cells import CubaLIF, SynapticParams, synaptic
from spikejax.nn.recurrent import Recurrent

DT = 1e-3
XS = jax.random.uniform(jax.random.key(0), (2, 5, 8, 8, 2))
HARD = partial(LIF, v_threshold=0.2, v_reset=0.0)
SOFT = partial(LIF, v_threshold=0.2)
CELLS = ("parallel", "cascade", "independent")


def windows(x, size, stride, padding):
    """[B, C, H, W] -> [B, C, H', W', size, size]."""
    pads = [(0, 0), (0, 0), *((int(p), int(p)) for p in padding)]
    views = np.lib.stride_tricks.sliding_window_view(np.pad(x, pads), size, (2, 3))
    return views[:, :, :: int(stride[0]), :: int(stride[1])]


def weighted(n, x):
    """Output of a node without time, or None."""
    if isinstance(n, nir.Linear | nir.Affine):
        return x @ n.weight.T + getattr(n, "bias", 0)
    if isinstance(n, nir.Conv2d):
        views = windows(x, n.weight.shape[2:], n.stride, n.padding)
        y = np.einsum("bchwij,ocij->bohw", views, n.weight)
        return y + n.bias[:, None, None]
    if isinstance(n, nir.SumPool2d | nir.AvgPool2d):
        views = windows(x, tuple(n.kernel_size), n.stride, n.padding)
        return (views.mean if isinstance(n, nir.AvgPool2d) else views.sum)((4, 5))
    if isinstance(n, nir.Flatten):
        return x.reshape(len(x), -1)
    if isinstance(n, nir.Scale):
        return x * n.scale
    if isinstance(n, nir.Threshold):
        return (x > n.threshold).astype(float)
    return x if isinstance(n, nir.Input | nir.Output) else None


def fired(n, v, x):
    """Membrane and output of a node with time, after one step of forward Euler."""
    if isinstance(n, nir.CubaLIF):
        v, i = v if isinstance(v, tuple) else (v, 0.0)
        i = i + DT / n.tau_syn * (n.w_in * x - i)
        lif = nir.LIF(n.tau_mem, n.r, n.v_leak, n.v_threshold, n.v_reset)
        lif.metadata = n.metadata
        v, z = fired(lif, v, i)
        return (v, i), z
    leaks = isinstance(n, nir.LIF | nir.LI)
    u = v + DT / n.tau * (n.v_leak - v + n.r * x) if leaks else v + DT * n.r * x
    if isinstance(n, nir.LI | nir.I):
        return u, u
    z = (u > n.v_threshold).astype(float)
    if n.metadata.get("reset") == "subtract":
        return u - n.v_threshold * z, z
    return np.where(z > 0, n.v_reset, u), z


def simulate(graph, xs):
    """Outputs [B, T, K]. Nodes act in their order; those before see the last step."""
    xs = np.moveaxis(np.asarray(xs, np.float64), -1, 2)
    values, membranes, ys = {}, {}, []
    for t in range(xs.shape[1]):
        for name, n in graph.nodes.items():
            parts = [values[a] for a, b in graph.edges if b == name and a in values]
            x = xs[:, t] if isinstance(n, nir.Input) else sum(parts[1:], parts[0])
            values[name] = weighted(n, x)
            if values[name] is None:
                start = n.metadata.get("v_start", getattr(n, "v_reset", 0.0))
                v = membranes.get(name, start)
                membranes[name], values[name] = fired(n, v, x)
        ys.append(values[list(graph.outputs)[0]])
    return np.stack(ys, 1)


def lively(model, seed=0):
    """The model, with norms that make its neurons fire."""
    rng = np.random.default_rng(seed)
    for _, m in nnx.iter_graph(model):
        if isinstance(m, nnx.BatchNorm):
            mean, var, scale, bias = rng.uniform(0.5, 1.5, (4, *m.mean[...].shape))
            m.mean = nnx.BatchStat(jnp.asarray(mean - 1, jnp.float32))
            m.var = nnx.BatchStat(jnp.asarray(var, jnp.float32))
            m.scale = nnx.Param(jnp.asarray(2 * scale, jnp.float32))
            m.bias = nnx.Param(jnp.asarray(bias, jnp.float32))
    model.eval()
    return model


def vgg(neuron, pool=nnx.avg_pool, **options):
    model = VGG((3, POOL, 4), 3, neuron=neuron, rngs=nnx.Rngs(0), hidden=(4,),
                in_channels=2, pool=pool, **options)  # fmt: skip
    return lively(model)


def resnet(neuron, residual, **options):
    rngs = nnx.Rngs(0)
    return lively(
        ResNet((1, 1), (3, 4), 3, neuron=neuron, residual=residual, rngs=rngs,
               in_channels=2, **options)
    )  # fmt: skip


def whitened(cell):
    neuron = partial(MultiThreshold, 3, cell, tau=3.0)
    rngs = nnx.Rngs(0)
    model = WhitenedCNN((3, 4), 3, neuron=neuron, in_channels=2, rngs=rngs)
    model.pool_spikes = True
    return lively(model)


class Net(nnx.Module):
    """A flattened image, recurrent neurons of three kinds, factors, a leaky readout."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 3, (3, 3), padding="VALID", rngs=rngs)
        self.neurons = LIF(v_threshold=0.2, v_reset=0.0)
        self.dense = nnx.Linear(6 * 6 * 3, 5, rngs=rngs)
        self.soft = Recurrent(LIF(v_threshold=0.3), 5, rngs=rngs)
        self.several = Recurrent(MultiThreshold((0.1, 0.3)), 5, rngs=rngs)
        self.hard = Recurrent(LIF(v_threshold=0.2, v_reset=0.0), 5, rngs=rngs)
        self.output = LI(4.0)

    def __call__(self, xs):
        xs = self.neurons(self.conv(xs))
        xs = self.dense(xs.reshape(*xs.shape[:2], -1))
        gains = jnp.linspace(0.5, 1.5, 5)
        xs = xs + self.hard(gains * self.several(3 * self.soft(xs)))
        return self.output(xs / 2) - xs


def converted(num_thresholds):
    ann = vgg(lambda: nnx.relu)
    return convert(calibrate(ann, XS).model, XS, num_thresholds).model


MODELS = (
    {
        "vgg": lambda: vgg(HARD),
        "vgg-or-pool": lambda: vgg(partial(IF, v_reset=0.0), nnx.max_pool),
        "vgg-below": lambda: vgg(partial(LIF, 3.0, v_reset=-0.25, decay_input=False)),
        "vgg-soft": lambda: vgg(SOFT),
        "vgg-node": lambda: vgg(SOFT),
        "plain": lambda: resnet(HARD, plain),
        "sew-imagenet": lambda: resnet(HARD, sew, imagenet_stem=True, hidden=4),
        "ms-soft": lambda: resnet(SOFT, ms),
        "ms-imagenet": lambda: resnet(
            partial(MultiThreshold, (0.3, 0.5)),
            ms,
            imagenet_stem=True,
            pool=nnx.avg_pool,
        ),
        "recurrent": Net,
        "converted": lambda: converted(1),
        "converted-node": lambda: converted(1),
        "converted-3": lambda: converted(3),
    }
    | {
        f"several-{name}": lambda name=name: vgg(
            partial(MultiThreshold, (0.3, 0.5, 1.0), getattr(neurons, name), tau=3.0)
        )
        for name in CELLS
    }
    | {
        # Their maxima are over the counts of several thresholds.
        f"whitened-{name}": lambda name=name: whitened(getattr(neurons, name))
        for name in CELLS[:2]
    }
)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    model = MODELS[name]()
    expected = jax.jit(lambda xs: model(xs))(XS)
    assert np.abs(np.diff(expected, axis=1)).max() > 0.02  # something fires
    how = {"soft_reset": node, "sum_pool": True} if name.endswith("node") else {}
    graph = to_nir(model, XS, dt=DT, **how)
    np.testing.assert_allclose(simulate(graph, XS), expected, atol=1e-5)
    nir.write(tmp_path / "net.nir", graph)
    back = from_nir(tmp_path / "net.nir", dt=DT)
    np.testing.assert_allclose(jax.jit(lambda xs: back(xs))(XS), expected, atol=1e-6)


class ByName(nnx.Module):
    """A ReLU network that calls its activations by name."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = (
            nnx.Linear(3, 8, rngs=rngs),
            nnx.Linear(8, 4, rngs=rngs),
        )

    def __call__(self, xs):
        return jnp.maximum(self.second(jax.nn.relu(self.first(xs))), 0)


def test_a_network_with_activations_by_name_is_written_once_converted():
    xs = jnp.broadcast_to(XS[:, :1, 0, 0, :1] * jnp.arange(1.0, 4.0), (2, 5, 3))
    snn = convert(calibrate(ByName(), xs).model, xs).model
    graph = to_nir(snn, xs, dt=DT, soft_reset=node)
    kinds = [type(n).__name__ for n in graph.nodes.values()]
    assert kinds == ["Input", "Affine", "IF", "Affine", "IF", "Scale", "Output"]
    expected = snn(xs)
    assert expected.max() > 0.1
    np.testing.assert_allclose(simulate(graph, xs), expected, atol=1e-5)


def test_a_chip_sees_weights_and_neurons_and_no_factors():
    layers = ["Conv2d", "IF", "AvgPool2d"] * 2
    expected = ["Input", *layers, "Flatten", "Affine", "IF", "Affine", "Output"]
    graph = to_nir(converted(1), XS, dt=DT, soft_reset=node)
    assert [type(n).__name__ for n in graph.nodes.values()] == expected
    graph = to_nir(converted(1), XS, dt=DT, soft_reset=node, sum_pool=True)
    expected = [k.replace("AvgPool", "SumPool") for k in expected]
    assert [type(n).__name__ for n in graph.nodes.values()] == expected


def test_exponential_integration_is_read_so():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), HARD())
    xs = 3 * XS[:, :, 0, 0, :1] * jnp.ones(3)
    graph = to_nir(model, xs, dt=DT, integration=EXPONENTIAL)
    assert graph.nodes["layers.1"].tau[0] == pytest.approx(DT / np.log(2))
    back = from_nir(graph, dt=DT, dialect=Dialect(EXPONENTIAL))
    assert model(xs).sum() > 1
    np.testing.assert_array_equal(back(xs), model(xs))


def test_units_and_starts_of_neurons_are_in_their_nodes():
    unit = np.array([0.5, 2.0, 1.0])
    check_neurons(
        Neuron(neurons.lif, NeuronParams(0.5), NeuronOptions(-0.25), unit=unit),
        Neuron(neurons.lif, NeuronParams(0.25), unit=unit, v_start=0.5),
        LIF(v_start=0.25, v_reset=0.0),
        Neuron(neurons.late_reset, NeuronParams(0.25)),
        Neuron(neurons.parallel, NeuronParams(0.2, (0.3, 0.9), (0.6, 0.6))),
        LIF(np.array([2.0, 3.0, 4.0]), np.array([0.4, 0.6, 0.8])),
    )


def test_synaptic_currents_are_in_one_node_or_a_node_before():
    taus = np.array([2.0, 3.0, 4.0])
    several = SynapticParams(0.25, (0.5, 1.0, 1.5), 0.5)
    check_neurons(
        CubaLIF(4.0, 0.6, v_reset=0.0),
        CubaLIF(4.0, 1.5, v_reset=-0.25, decay_input=False, tau_synapse=3.0),
        CubaLIF(taus, taus / 4, tau_synapse=taus[::-1]),
        CubaLIF(np.inf, decay_input=False),  # IF behind an LI
        CubaLIF(3.0, v_reset=0.0, tau_synapse=np.inf),  # LIF behind an I
        Neuron(synaptic, several, start=neurons.rest_both),
    )
    layer = Recurrent(CubaLIF(3.0, 0.4, v_reset=0.0), 3, rngs=nnx.Rngs(0))
    check_neurons(layer)


def check_neurons(*layers):
    """Compare layers with the text of their nodes, and with their reading."""
    xs = 4 * jax.random.uniform(jax.random.key(1), (2, 6, 3)) - 1
    for layer in layers:
        ys = layer(xs)
        assert 0.05 < (ys > 0).mean() < 0.95
        for soft_reset in (loop, node):
            graph = to_nir(layer, xs, dt=DT, soft_reset=soft_reset)
            np.testing.assert_allclose(simulate(graph, xs), ys, atol=1e-5)
            np.testing.assert_allclose(from_nir(graph, dt=DT)(xs), ys, atol=1e-5)


class Does(nnx.Module):
    """A convolution, neurons, and what its function says."""

    def __init__(self, does, neuron=HARD):
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0))
        self.neurons, self.does = neuron(), does
        self.other = nnx.ConvTranspose(2, 2, (3, 3), (2, 2), rngs=nnx.Rngs(0))

    def __call__(self, xs):
        return self.does(self, self.neurons(self.conv(xs)))


def kinds_of(does, **options):
    nodes = to_nir(Does(does, **options), XS, dt=DT).nodes.values()
    return [type(n).__name__ for n in nodes]


def test_what_joins_layers_becomes_nodes():
    head = ["Input", "Conv2d", "LIF"]
    assert kinds_of(lambda self, xs: xs.mean((2, 3))) == [
        *head, "AvgPool2d", "Flatten", "Output"]  # fmt: skip
    assert kinds_of(lambda self, xs: xs.sum((2, 3))) == [
        *head, "SumPool2d", "Flatten", "Output"]  # fmt: skip
    assert kinds_of(lambda self, xs: nnx.max_pool(xs, (2, 2), (2, 2))) == [
        *head, "SumPool2d", "Threshold", "Output"]  # fmt: skip
    assert kinds_of(lambda self, xs: xs + xs) == [*head, "Scale", "Output"]
    assert kinds_of(lambda self, xs: 2 * xs - xs) == [*head, "Scale", "Scale", "Output"]
    folded = lambda self, xs: xs.reshape(-1, 8, 8, 2).reshape(xs.shape)  # noqa: E731
    assert kinds_of(folded) == [*head, "Output"]


def test_a_value_with_two_uses_stays_for_the_other():
    def sums(self, xs):
        total = xs.sum((2, 3))
        return total / 64 + total

    def weights(self, xs):
        ys = self.conv(xs)
        return (ys + self.neurons(ys * jnp.asarray([1.0, 2.0]))).sum((2, 3))

    def joined(self, xs):
        ys = self.conv(xs)
        both = jnp.concatenate([ys, 2 * ys, -ys], -1)
        return self.neurons(both * jnp.arange(1.0, 7) + jnp.arange(6)).sum((2, 3))

    def negated(self, xs):
        ys = -self.conv(xs) + jnp.asarray([1.0, 2.0])
        mean = self.neurons(ys).mean((2, 3))
        return jnp.concatenate([mean, 3 * mean], -1)

    assert {"AvgPool2d", "SumPool2d"} < set(kinds_of(sums))
    for does in (sums, weights, joined, negated):
        model = Does(does)
        graph = to_nir(model, XS, dt=DT)
        np.testing.assert_allclose(simulate(graph, XS), model(XS), atol=1e-5)


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (lambda self, xs: xs.mean(1), r"a sum over the axes \(1,\) at test_nir_write"),
        (lambda self, xs: xs * xs, "a product of two values or a division by one"),
        (lambda self, xs: 1 / (xs + xs), "a product of two values or a division by"),
        (lambda self, xs: nnx.relu(xs), "the operation max.* For .* first convert"),
        (lambda self, xs: (xs, xs), "an output that is not one array"),
        (lambda self, xs: jnp.ones((2, 5, 3)), "an output that is not one array"),
        (lambda self, xs: xs + 1, "the addition of a constant"),
        (lambda self, xs: xs * jnp.arange(5.0)[:, None, None, None], "step to step"),
        (
            lambda self, xs: nnx.max_pool(xs + self.conv(xs), (2, 2), (2, 2)),
            r"a maximum over windows of what is not spikes.*\. Pool by .*--pool avg",
        ),
        (
            lambda self, xs: xs[:, :, ::2],
            "expected what NIR can say, got the operation",
        ),
        (
            lambda self, xs: jnp.concatenate([xs, xs], 1),
            "values side by side that are not the channels of images at test_nir",
        ),
        (
            lambda self, xs: nnx.max_pool(-xs, (2, 2), (2, 2)),
            "a maximum over windows of what is not spikes",
        ),
        (lambda self, xs: self.other(xs), "a convolution of kernel"),
        (lambda self, xs: xs.reshape(2, 5, 64, 2), "a change of shape from"),
        (
            lambda self, xs: nnx.max_pool(xs, (3, 3), (2, 2), "SAME"),
            "image.* Take the same",
        ),
        (lambda self, xs: xs.reshape(2, 5, -1), "an output that is a flattened image"),
        (
            lambda self, xs: jax.lax.scan(lambda c, x: (c, c + x), xs[0], xs)[1],
            "the operation (slice|squeeze|scan|dynamic_slice|gather) at",
        ),
    ],
)
def test_what_nir_cannot_say_is_told_with_its_place(does, message):
    with pytest.raises(ValueError, match=message):
        to_nir(Does(does), XS, dt=DT)


def test_a_maximum_of_counts_needs_thresholds_that_rise():
    def pooled(self, xs):
        return nnx.max_pool(xs, (2, 2), (2, 2))

    rising = kinds_of(pooled, neuron=lambda: MultiThreshold(3, neurons.cascade))
    assert rising.count("SumPool2d") == 3
    # The second of these may fire where the first does not.
    halving = MultiThreshold((1.0, 0.5), neurons.cascade)
    falling = Neuron(neurons.parallel, NeuronParams(0.5, (1.0, 0.5), (1.0, 1.0)))
    for neuron in (halving, falling):
        with pytest.raises(ValueError, match="a maximum over windows of what is not "):
            kinds_of(pooled, neuron=lambda neuron=neuron: neuron)


def test_networks_that_do_not_spike_are_told_what_to_do():
    with pytest.raises(ValueError, match=r"first convert\(calibrate"):
        to_nir(calibrate(vgg(lambda: nnx.relu), XS).model, XS, dt=DT)
    with pytest.raises(ValueError, match="expected dt > 0 in seconds, .* got 0"):
        to_nir(Net(), XS, dt=0)
    with pytest.raises(ValueError, match=r"an input \[B, T, H, W, C\] or"):
        to_nir(Net(), XS[0, 0, 0], dt=DT)


def test_a_graph_that_was_read_is_written_again():
    graph = to_nir(Does(lambda self, xs: xs.mean((2, 3))), XS, dt=DT)
    model = from_nir(graph, dt=DT)
    again = to_nir(model.parts[0], XS, dt=DT)
    assert [type(n).__name__ for n in again.nodes.values()][1] == "Conv2d"
    loops = from_nir(to_nir(Does(lambda self, xs: xs, SOFT), XS, dt=DT), dt=DT)
    with pytest.raises(ValueError, match="to_nir: expected what NIR can say"):
        to_nir(loops, XS, dt=DT)


def test_the_model_stays_as_it_was():
    model = vgg(HARD)
    before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    to_nir(model, XS, dt=DT)
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after, strict=True))
