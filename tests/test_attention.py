"""Attention between spikes: by hand, in both orders, exact, and counted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import IF, MultiThreshold, _compat, energy, spike_driven
from spikejax.nn.attention import (
    driven_attention,
    linear_attention,
    self_attention,
    token_attention,
)


def sums(x):
    """A neuron that shows its current."""
    return x


def counts(seed, *shape, largest=4):
    drawn = np.random.default_rng(seed).integers(0, largest + 1, shape)
    return drawn.astype(np.float32)


def test_self_attention_by_hand():
    # Tokens 1 and 2, one head: q k^T = [[1, 2], [0, 1]].
    q = jnp.array([[[[1.0, 0.0], [0.0, 1.0]]]])
    k = jnp.array([[[[1.0, 0.0], [2.0, 1.0]]]])
    v = jnp.array([[[[1.0, 3.0], [0.0, 1.0]]]])
    found = self_attention(q, k, v, sums, heads=1, scale=0.5)
    np.testing.assert_array_equal(found[0, 0], [[0.5, 2.5], [0.0, 0.5]])
    # With a head per channel, each has a product of its own.
    found = self_attention(q, k, v, sums, heads=2, scale=1.0)
    np.testing.assert_array_equal(found[0, 0], [[1, 0], [0, 1]])
    # An eighth, where nothing is said, as in the paper.
    eighth = self_attention(q, k, v, sums, heads=1)
    np.testing.assert_array_equal(eighth[0, 0], [[0.125, 0.625], [0.0, 0.125]])


@pytest.mark.parametrize("tokens", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize(("size", "features", "heads"), [(6, 6, 3), (4, 16, 2)])
def test_the_order_with_fewer_products_is_computed(tokens, size, features, heads):
    q, v = counts(0, 1, 40, tokens, size), counts(1, 1, 40, tokens, features)
    attend = partial(self_attention, neuron=sums, heads=heads)
    parts = jax.make_jaxpr(attend)(q, q, v).eqns
    made = [part for part in parts if part.primitive.name == "dot_general"]
    found = 0
    for part in made:
        ((axes, _), _), left = part.params["dimension_numbers"], part.invars[0].aval
        found += part.outvars[0].aval.size * np.prod([left.shape[a] for a in axes])
    outer = tokens * tokens * (size + features)  # q k, then v
    inner = 2 * tokens * size * features // heads  # k v, then q
    assert found == 40 * min(outer, inner)


@pytest.mark.parametrize("tokens", [2, 40])  # q k first, k v first
def test_products_of_counts_are_exact_in_bfloat16(tokens):
    q, k = counts(0, 2, 1, tokens, 32), counts(1, 2, 1, tokens, 32)
    v = counts(2, 2, 1, tokens, 64)
    split = [x.astype(int).reshape(2, tokens, 2, -1) for x in (q, k, v)]
    expected = np.einsum("bnhd,bmhd,bmhe->bnhe", *split).reshape(v.shape)
    assert expected.max() > 2**9  # more digits than bfloat16 has
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    currents = []

    def neuron(x):
        currents.append(x)
        return x

    spikes = self_attention(*half, neuron, heads=2, scale=1.0)
    assert currents[0].dtype == jnp.float32 and spikes.dtype == jnp.bfloat16
    np.testing.assert_array_equal(currents[0], expected)


def test_linear_attention_has_the_scale_of_its_paper():
    q, k, v = (counts(n, 1, 1, 3, 8) for n in range(3))
    found = linear_attention(q, k, v, sums, heads=2, largest=4)
    plain = self_attention(q / 4, k / 4, v / 4, sums, heads=2, scale=1.0)
    np.testing.assert_allclose(found, 2 / 4**0.5 * plain, rtol=1e-6)


def test_driven_attention_by_hand():
    q = jnp.array([[[[1.0, 1.0], [0.0, 2.0]]]])
    k = jnp.array([[[[1.0, 0.0], [1.0, 1.0]]]])
    v = jnp.array([[[[1.0, 1.0], [2.0, 1.0]]]])
    # Sums over tokens of k v: 3 and 1.
    found = driven_attention(q, k, v, sums)
    np.testing.assert_array_equal(found[0, 0], [[3, 1], [0, 2]])
    found = driven_attention(q, k, v, IF(2.0))
    np.testing.assert_array_equal(found[0, 0], [[1, 0], [0, 0]])


def test_token_attention_by_hand():
    q = jnp.array([[[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.0]]]])
    k = jnp.array([[[[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0]]]])
    found = token_attention(q, k, sums, heads=2)
    np.testing.assert_array_equal(found[0, 0], [[2, 0, 0, 0], [0, 0, 3, 6]])
    found = token_attention(q, k, IF(3.0), heads=2)
    np.testing.assert_array_equal(found[0, 0], [[0, 0, 0, 0], [0, 0, 1, 2]])


@pytest.mark.parametrize(
    ("attend", "shape", "heads"),
    [(self_attention, (2, 4, 6), 2), (token_attention, (1, 2, 4, 6), 4)],
)
def test_tokens_and_heads_that_do_not_fit(attend, shape, heads):
    parts = [jnp.ones(shape)] * (2 if attend is token_attention else 3)
    text = (
        f"{attend.__name__}: expected spikes \\[B, T, tokens, channels\\] with .* got "
    )
    with pytest.raises(ValueError, match=text + ".*heads"):
        attend(*parts, sums, heads=heads)


class Net(nnx.Module):
    """Spikes, attention, and weights that get its result."""

    def __init__(self, attend, neuron, count=3):
        self.attend = attend
        self.neurons = _compat.List(neuron() for _ in range(count))
        self.last_neuron = neuron()
        self.last = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def spikes(self, xs):
        return [neuron(x) for neuron, x in zip(self.neurons, xs, strict=True)]

    def __call__(self, xs):  # [B, T, tokens, 3, channels]
        parts = self.spikes(jnp.moveaxis(xs, 3, 0)[: len(self.neurons)])
        return self.last(self.attend(*parts, self.last_neuron))


two = partial(MultiThreshold, 2, decay_input=False)
CURRENTS = 3 * jax.random.uniform(jax.random.key(0), (2, 2, 5, 3, 4))


def test_energy_counts_the_products_of_attention():
    net = Net(partial(self_attention, heads=1, scale=0.25), two)
    q, k, v = net.spikes(jnp.moveaxis(CURRENTS, 3, 0))
    kv = np.einsum("btnd,btne->btde", k, v)  # fewer products than q k first
    first, second = kv.sum(), (q @ (kv != 0)).sum()
    rows = energy.measure(net, CURRENTS).connections
    assert [row.macs for row in rows] == [0, 0, 0]
    assert [row.acs for row in rows[:2]] == [first / 2, second / 2]
    assert [row.dense_macs for row in rows] == [5 * 4 * 4, 5 * 4 * 4, 5 * 4 * 2]


ATTENTIONS = {
    # Rows of products, and binary trains that each meets.
    "self": (partial(self_attention, heads=2, scale=0.25), 3, [2, 2, 2]),
    "driven": (driven_attention, 3, [2, 4]),
    "token": (partial(token_attention, heads=2), 2, [4]),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_binary_spikes_alone_compute_attention(name):
    attend, count, trains = ATTENTIONS[name]
    net = Net(attend, two, count)
    logits, report = spike_driven(net, CURRENTS)
    np.testing.assert_allclose(logits, net(CURRENTS), rtol=0, atol=1e-6)
    assert [layer.trains for layer in report.layers] == trains
    rows = energy.measure(net, CURRENTS).connections
    for row, layer in zip(rows, report.layers, strict=True):
        assert (row.path, row.acs, row.macs) == (layer.path, layer.acs, layer.macs)
        assert layer.acs > 0 == layer.macs and not layer.reason
