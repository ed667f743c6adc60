"""Energy: numbers of operations worked out by hand, for inputs that are known."""

import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from golden import make_energy as golden

from spikejax import energy, neurons
from spikejax._compat import List
from spikejax.functions import Function
from spikejax.layers import IF, LIF, MultiThreshold
from spikejax.memory import keep_membranes
from spikejax.models import general, resnet
from spikejax.nn.psn import PSN
from spikejax.nn.quant import QuantReLU
from spikejax.nn.recurrent import LSTM, Recurrent

RNGS = nnx.Rngs(0)
ONES = nnx.initializers.ones_init()

# Integrate-and-fire with N thresholds at T=1: emits what it is given, up to N.
counter = partial(MultiThreshold, tau=math.inf, decay_input=False)


class Chain(nnx.Module):
    """Layers and plain functions, one after the other."""

    def __init__(self, *layers):
        self.layers = List(layers)

    def __call__(self, xs):
        for layer in self.layers:
            xs = layer(xs)
        return xs


def conv(inputs, outputs, size, **options):
    options = {"use_bias": False, "kernel_init": ONES, "rngs": RNGS} | options
    return nnx.Conv(inputs, outputs, (size, size), **options)


def linear(inputs, outputs, **options):
    return nnx.Linear(inputs, outputs, kernel_init=ONES, rngs=RNGS, **options)


def image(*pixels, shape):
    """One example of one time step, zero but for {place: value}."""
    xs = np.zeros(shape, np.float32)
    for place, value in pixels:
        xs[place] = value
    return jnp.asarray(xs)[None, None]


def test_conv_3x3_loses_what_the_padding_would_have_met():
    xs = image(((0, 0, 0), 0.5), ((0, 2, 0), 0.5), ((2, 2, 0), 0.5), shape=(4, 4, 1))
    (row,) = energy.measure(conv(1, 2, 3), xs).connections
    assert (row.acs, row.macs) == (0, 2 * (4 + 6 + 9))  # a corner, an edge, the inside
    assert row.dense_macs == 2 * (3 * 4 - 2) ** 2


def test_conv_with_stride_meets_few_weights():
    xs = image(((1, 1, 0), 0.5), ((3, 3, 0), 0.5), shape=(4, 4, 1))
    layer = conv(1, 1, 3, strides=(2, 2), padding=((1, 1), (1, 1)))
    (row,) = energy.measure(layer, xs).connections
    assert row.macs == 4 + 1  # windows around 0 and 2; the last pixel is in one
    assert row.dense_macs == 5 * 5


def test_grouped_conv_meets_its_group_only():
    xs = image(((0, 0, 0), 0.5), shape=(2, 2, 4))
    layer = conv(4, 4, 1, feature_group_count=2)
    (row,) = energy.measure(layer, xs).connections
    assert (row.macs, row.dense_macs) == (2, 2 * 2 * 4 * 2)


def test_linear_and_the_mean_over_the_batch():
    xs = jnp.array([[[0.5, 0.0, 0.0]], [[0.5, 0.1, -0.1]]])
    (row,) = energy.measure(linear(3, 5), xs).connections
    assert (row.macs, row.dense_macs) == ((1 + 3) / 2 * 5, 15)


def test_linear_on_tokens_counts_each_of_them():
    xs = jnp.full((2, 3, 7, 4), 0.5)
    (row,) = energy.measure(linear(4, 5), xs).connections
    assert (row.macs, row.dense_macs) == (3 * 7 * 4 * 5, 7 * 4 * 5)


def test_pruned_weights_cost_nothing_but_in_the_dense_network():
    layer = linear(3, 5)
    layer.kernel[...] = layer.kernel[...].at[0, :4].set(0)
    xs = jnp.array([[[0.5, 0.5, 0.0]]])
    (row,) = energy.measure(layer, xs).connections
    assert (row.macs, row.dense_macs) == (1 + 5, 15)


@pytest.mark.parametrize("cell", [neurons.parallel, neurons.cascade])
def test_every_spike_of_four_thresholds_counts(cell):
    model = Chain(counter(4, cell), linear(3, 5))
    report = energy.measure(model, jnp.array([[[2.0, 0.0, 9.0]]]))
    assert report.neurons == (energy.Firing("layers/0", (2 + 4) / 3, 6.0),)
    assert (report.acs, report.macs) == ((2 + 4) * 5, 0)


def test_rate_is_per_step_and_spikes_are_over_all_steps():
    model = Chain(IF(v_threshold=2.0), linear(2, 5))
    xs = jnp.broadcast_to(jnp.array([1.0, 0.5]), (3, 4, 2))
    report = energy.measure(model, xs)  # at T=4: 2 spikes and 1
    assert report.neurons == (energy.Firing("layers/0", 3 / 8, 3.0),)
    assert report.acs == 15
    assert report.dense_macs == 10  # of one step


def test_channels_that_never_fire_are_named_with_their_membranes():
    # the second adds up to 1, the third to -1, the last to 3 of 4; others fire
    thresholds = np.array([1.0, 2.0, 2.0, 4.0, 1.0])
    xs = jnp.broadcast_to(jnp.array([1.0, 0.25, -0.25, 0.75, 2.0]), (2, 4, 5))
    model = Chain(IF(v_threshold=thresholds), linear(5, 3), LIF(v_threshold=99.0))
    report = energy.measure(model, xs)
    first, last = report.silent
    assert (first.path, first.channels, first.of) == ("layers/0", (1, 2, 3), 5)
    u = np.outer([0.25, -0.25, 0.75], [1, 2, 3, 4])  # membranes of the four steps
    assert first.threshold == 2 and first.highest == 3
    assert first.mean == pytest.approx(u.mean(), rel=1e-6)
    assert first.deviation == pytest.approx(u.std(), rel=1e-6)
    assert (last.channels, last.of, last.threshold) == ((0, 1, 2), 3, 99)
    assert str(first) == "layers/0: 3 of 5 channels; membranes 0.625 ± " + (
        f"{u.std():.3g}, at most 3; threshold 2"
    )
    lines = str(report).splitlines()
    assert lines[1].split() == ["layers/0", "0.4000", "8"]
    assert lines[4].split() == ["layers/1", "24", "0", "15"]
    assert lines[5] == "8 spikes, 0.0216 nJ; dense without spikes 0.069 nJ"
    assert lines[6:] == [f"silent {first}", f"silent {last}"]


def test_no_membrane_is_known_where_a_layer_has_none():
    psn = PSN(2, rngs=nnx.Rngs(0))
    (row,) = energy.measure(psn, -jnp.ones((1, 2, 3))).silent
    assert row.channels == (0, 1, 2) and row.reason == ""
    assert str(row).endswith(": 3 of 3 channels")


@pytest.mark.parametrize(
    ("thresholds", "cell", "value", "spikes"),
    [
        ((1.0, 0.5, 0.25), neurons.cascade, 0.75, 2),
        ((1.0, 0.5, 0.25), neurons.cascade, 1.75, 3),
        ((1.0, 4.0), neurons.parallel, 5.0, 2),
    ],
)
def test_unequal_thresholds_count_spikes_and_not_the_value(
    thresholds, cell, value, spikes
):
    layer = counter(thresholds, cell)
    assert float(layer(jnp.full((1, 1, 1), value))[0, 0, 0]) != spikes
    report = energy.measure(Chain(layer, linear(1, 5)), jnp.full((1, 1, 1), value))
    assert (report.spikes_per_image, report.acs, report.macs) == (spikes, spikes * 5, 0)


def test_counts_pass_max_pooling():
    model = Chain(
        counter((1.0, 0.5), neurons.cascade),
        partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)),
        conv(1, 3, 1),
    )
    xs = image(((0, 0, 0), 1.5), ((0, 1, 0), 0.5), ((3, 3, 0), 0.5), shape=(4, 4, 1))
    report = energy.measure(model, xs)
    assert (report.spikes_per_image, report.acs) == (2 + 1 + 1, (2 + 1) * 3)


def test_averages_of_spikes_cost_macs():
    model = Chain(
        IF(), partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2)), conv(1, 3, 1)
    )
    xs = image(((0, 0, 0), 1), ((0, 1, 0), 1), ((3, 3, 0), 1), shape=(4, 4, 1))
    report = energy.measure(model, xs)
    assert (report.acs, report.macs) == (0, 2 * 3)


class Sum(nnx.Module):
    """A spiking residual sum before a linear layer."""

    def __init__(self):
        self.first = IF()
        self.second = counter((1.0, 0.5), neurons.cascade)
        self.linear = linear(2, 5)

    def __call__(self, xs):
        return self.linear(self.first(xs) + self.second(xs))


def test_spikes_add_up_in_residual_sums():
    report = energy.measure(Sum(), jnp.array([[[1.5, 0.5]]]))
    # of 1.5: one spike and two; of 0.5: none and one
    assert (report.spikes_per_image, report.acs) == (4, (1 + 2 + 0 + 1) * 5)


def test_relu_network_costs_macs_where_it_is_active():
    model = Chain(linear(3, 3), nnx.relu, linear(3, 5))
    model.layers[0].kernel[...] = jnp.diag(jnp.array([1.0, -1.0, 1.0]))
    report = energy.measure(model, jnp.array([[[0.5, 0.5, 0.0]]]))
    first, second = report.connections
    assert (first.macs, second.macs, report.acs) == (2, 5, 0)
    assert report.neurons == () and report.spikes_per_image == 0


def test_real_inputs_are_those_of_the_model_and_not_of_the_replayed_counts():
    # 1.5 = 1 + 0.5 makes 1.5 - 1.5 = 0 for the ReLU, but 2 counts make 2 - 1.5.
    model = Chain(
        counter((1.0, 0.5), neurons.cascade), lambda x: nnx.relu(x - 1.5), linear(1, 5)
    )
    report = energy.measure(model, jnp.full((1, 1, 1), 1.5))
    assert (report.acs, report.macs) == (0, 0)


def test_a_shared_layer_counts_each_time_it_runs():
    shared = linear(2, 2)
    shared.kernel[...] = jnp.eye(2)
    model = Chain(shared, shared, IF(), IF())
    model.layers[3] = model.layers[2]
    report = energy.measure(model, jnp.array([[[1.5, 0.0]]]))
    assert [row.path for row in report.connections] == ["layers/0"]
    assert (report.macs, report.dense_macs) == (2, 8)
    assert report.neurons == (energy.Firing("layers/2", 2 / 4, 2.0),)


def test_energy_of_acs_and_macs_in_nanojoule():
    model = Chain(linear(2, 10), nnx.relu, IF(), linear(10, 100))
    report = energy.measure(model, jnp.array([[[0.75, 0.75]]]))
    assert (report.macs, report.acs) == (20, 1000)
    assert report.energy_nj == pytest.approx(0.9 * 1.0 + 4.6 * 0.02)
    assert report.ann_energy_nj == pytest.approx(4.6 * 1.02)


def test_rows_are_in_the_order_of_the_computation():
    model = Chain(*(linear(1, 1) for _ in range(11)))
    rows = energy.measure(model, jnp.full((1, 1, 1), 0.5)).connections
    assert [row.path for row in rows] == [f"layers/{k}" for k in range(11)]


def test_bfloat16_counts_exactly():
    model = Chain(IF(), linear(1, 1001, dtype=jnp.bfloat16))
    report = energy.measure(model, jnp.ones((1, 1, 1), jnp.bfloat16))
    assert report.acs == 1001


@pytest.fixture(scope="module")
def network():
    make = partial(LIF, tau=2.0)
    model = resnet.ResNet((1, 1), (4, 8), 3, neuron=make, rngs=nnx.Rngs(0))
    for block in model.blocks:
        block.norms[-1].scale[...] = jnp.ones_like(block.norms[-1].scale[...])
    return model


XS = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 3))


@pytest.fixture(scope="module")
def report(network):
    return energy.measure(network, XS)


def test_membrane_shortcuts_and_the_stem_cost_macs(report):
    rows = {row.path: row for row in report.connections}
    assert {path for path, row in rows.items() if row.macs} == {
        "stem_conv",
        "blocks/1/shortcut_conv",
        "head",  # of the mean over space
    }
    assert rows["blocks/0/convs/0"].acs > 0
    assert rows["stem_conv"].macs == 2 * rows["stem_conv"].dense_macs
    assert report.spikes_per_image == sum(row.spikes for row in report.neurons) > 0


def test_the_model_stays_as_it_is(network):
    def arrays():
        return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(network)))

    before = arrays()
    energy.measure(network, XS)
    jax.tree.map(np.testing.assert_array_equal, before, arrays())
    assert type(network.stem_conv) is nnx.Conv
    assert type(network.stage_neuron) is LIF
    assert not network.stem_norm.use_running_average


def test_measures_in_evaluation_mode():
    xs = jnp.full((2, 1, 2), 1.5)  # in training mode, norm makes nothing of it
    norm = nnx.BatchNorm(2, rngs=RNGS)
    assert energy.measure(Chain(norm, IF()), xs).spikes_per_image == 2


def test_works_on_weights_in_plain_dicts(network, report):
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    plain = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    assert {energy.measure(nnx.merge(graphdef, *plain), XS)} == {report}


def test_kept_membranes_are_ignored_and_not_moved():
    half = jnp.full((1, 1, 1), 0.5)
    model = keep_membranes(Chain(IF(), lambda xs: 0.5 * xs, linear(1, 5)), half)
    model(half)
    for _ in range(2):
        assert energy.measure(model, half).spikes_per_image == 0
    np.testing.assert_array_equal(model.layers[0].memory.held[0][...], [[0.5]])


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected input \[B, T, ...\].*got \(3,\)"):
        energy.measure(linear(3, 5), jnp.ones(3))


def test_a_model_without_products_and_spikes_is_a_warning():
    with pytest.warns(UserWarning, match="found none: there is nothing to count"):
        assert energy.measure(Chain(nnx.relu), jnp.ones((1, 1, 2))).connections == ()


# Products wherever they are computed


class Attention(nnx.Module):
    """Spiking self-attention without a softmax."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.q, self.k, self.v = (nnx.Linear(4, 4, rngs=rngs) for _ in range(3))
        self.neurons = List([IF(0.5) for _ in range(3)])

    def parts(self, xs):
        pairs = zip(self.neurons, (self.q, self.k, self.v), strict=True)
        return [neuron(layer(xs)) for neuron, layer in pairs]

    def __call__(self, xs):
        q, k, v = self.parts(xs)
        return (q @ k.swapaxes(-1, -2)) @ v


def test_products_of_activations_count_where_spikes_meet_what_is_not_zero():
    xs = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 3, 5, 4)).astype("float32")
    model = Attention()
    q, k, v = model.parts(xs)
    qk = q @ k.swapaxes(-1, -2)
    rows = energy.measure(model, xs).connections
    assert [row.path for row in rows[:3]] == ["q", "k", "v"]
    assert [row.acs for row in rows[3:]] == [qk.sum() / 2, ((qk != 0) @ v).sum() / 2]
    assert [row.macs for row in rows[3:]] == [0, 0]
    assert [row.dense_macs for row in rows[3:]] == [5 * 4 * 5, 5 * 5 * 4]
    assert rows[3].path.startswith("test_energy.py")


@pytest.mark.parametrize("wrap", [nnx.remat, jax.jit])
def test_products_in_scans_and_under_transformations(wrap):
    weights = jnp.tile(jnp.eye(3), (2, 1, 1))

    def network(params, xs):
        def body(xs, w):
            return wrap(lambda w, xs: jnp.maximum(xs @ w, 0))(w, xs), None

        return jax.lax.scan(body, xs, params["layers"]["w"])[0]

    model = Function(network, {"layers": {"w": weights}}, time=True)
    (row,) = energy.measure(model, jnp.full((2, 4, 3), 0.5)).connections
    assert row == energy.Operations("layers", 0, 4 * 2 * 3, 2 * 3 * 3)


def test_networks_of_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(2, (3, 3), feature_group_count=2)(x))
            return linen.Dense(5)(x.mean((1, 2)))

    images = jnp.ones((2, 4, 4, 2)) / 2
    variables = Net().init(jax.random.key(0), images)
    model = Function(Net().apply, variables)
    conv, dense = energy.measure(model, images[:, None]).connections
    assert (conv.path, conv.macs, conv.dense_macs) == ("Conv_0", 200, 200)
    assert (dense.path, dense.macs, dense.dense_macs) == ("Dense_0", 10, 10)


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_levels_of_a_quantised_relu_are_no_spikes(scale):
    model = Chain(QuantReLU(2, scale=scale), linear(3, 5))
    report = energy.measure(model, jnp.array([[[1.2, 2.2, -1.0]]]))
    assert (report.acs, report.macs) == (0, 10)


def test_a_layer_behind_the_mean_over_time_is_dense_once():
    model = Chain(linear(3, 4), lambda xs: xs.mean(1), linear(4, 5))
    rows = energy.measure(model, jnp.ones((2, 6, 3))).connections
    assert [row.dense_macs for row in rows] == [12, 20]


@pytest.mark.parametrize("name", ["relu sew", "lif plain", "parallel sew", "dyadic ms"])
def test_every_row_of_a_resnet_20(name):
    """Rows of the counter that looked at modules; make_energy.py has all."""
    expected = json.loads(golden.FILE.read_text())
    assert golden.rows(*name.split()) == expected[name]


# Networks that hold the membranes themselves, and those that feed back


class Stepped(nnx.Module):
    """Two steps of neurons with membranes of its own, then weights."""

    def __init__(self, neuron):
        self.neuron = neuron
        self.linear = linear(3, 5)

    def __call__(self, xs):
        v, first = self.neuron.step(self.neuron.start(xs.shape), xs)
        _, second = self.neuron.step(v, xs)
        return self.linear(first) + self.linear(second)


def test_steps_of_a_neuron_count_like_its_calls():
    """2.5 fires 2 and keeps 0.5, then 3; 0.5 fires nothing, then 1."""
    report = energy.measure(Stepped(counter(4)), jnp.array([[[2.5, 0.0, 0.5]]]))
    assert report.neurons == (energy.Firing("neuron", (2 + 3 + 1) / 6, 6.0),)
    assert (report.acs, report.macs) == (6 * 5, 0)


def test_recurrent_weights_are_met_by_all_spikes_but_the_last():
    neurons = Recurrent(counter(4), 2, rngs=nnx.Rngs(0))
    neurons.recurrent.kernel[...] = jnp.array([[0.0, 1.0], [0.0, 0.0]])
    xs = jnp.array([[[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])
    # spikes 2 0, 0 2, 1 0: the first two meet one weight each, the others none
    report = energy.measure(Chain(neurons, linear(2, 5)), xs)
    assert report.spikes_per_image == 5
    rows = {row.path: (row.acs, row.macs) for row in report.connections}
    assert rows == {"layers/0/recurrent": (2, 0), "layers/1": (5 * 5, 0)}


def test_recurrent_weights_of_an_lstm_see_real_values():
    lstm = LSTM(3, 2, rngs=nnx.Rngs(0))
    xs = jnp.ones((1, 4, 3))  # four time steps, all spikes
    report = energy.measure(Chain(counter(1), lstm), xs)
    rows = {row.path: (row.acs, row.macs) for row in report.connections}
    assert rows["layers/1/inputs"] == (4 * 3 * 8, 0)
    assert rows["layers/1/recurrent"] == (0, 3 * 2 * 8)


def test_general_snn_costs_acs_where_it_spikes_and_macs_elsewhere():
    model = general.cnn(10, depths=(2, 1), width=1 / 12, rngs=nnx.Rngs(0))
    report = energy.measure(model, XS[:, :1])
    rows = {row.path: (row.acs, row.macs) for row in report.connections}
    for path, (acs, macs) in rows.items():
        in_network = re.search("mixer/network", path)
        tiled = re.search("stages/(0/0|1/0)/mixer/linear", path)
        if in_network or tiled:
            assert macs == 0, path
        else:  # stem, MLP, merging, head, and the means of overlapping windows
            assert acs == 0, path
    assert rows["stages/0/0/mixer/network/layers/0"][0] > 0
    assert report.acs > 0 and report.macs > 0
    # 4x4 maps of 4 channels: the stem of 2x2x3 pixels, then the MLP of 4 to 12
    dense = {row.path: row.dense_macs for row in report.connections}
    assert dense["stem"] == 16 * 12 * 4 and dense["stages/0/0/widen"] == 16 * 4 * 12
    # two 3x3 convolutions in four windows of 2x2: each pixel meets 4 of 9 weights
    assert dense["stages/0/0/mixer/network/layers/0"] == 4 * 4 * 4 * 4 * 4


def test_an_input_of_whole_numbers_counts_as_spikes_and_of_others_does_not():
    layer, xs = nnx.Linear(3, 5, rngs=nnx.Rngs(0)), jnp.array([[[0.0, 2.0, 1.0]]])
    spikes, values = energy.measure(layer, xs), energy.measure(layer, xs / 2)
    assert (spikes.acs, spikes.macs) == (15, 0)
    assert (values.acs, values.macs) == (0, 10)
