"""Networks as graphs: order, sums, loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax.layers import LI, LIF, MultiThreshold
from spikejax.memory import keep_membranes
from spikejax.neurons import independent
from spikejax.nir import from_nir, to_nir
from spikejax.nir.graph import Graph
from spikejax.nir.layers import Scale, Threshold
from spikejax.nn.recurrent import Recurrent

XS = jax.random.uniform(jax.random.key(0), (2, 7, 3))


def with_loop(neuron, weights):
    """Neurons whose spikes come back through weights."""
    back = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    back.kernel, back.bias = nnx.Param(weights), nnx.Param(jnp.zeros(3))
    edges = [("in", "n"), ("back", "n"), ("n", "back"), ("n", "out")]
    return Graph({"back": back, "n": neuron}, edges, "in", "out")


def test_nodes_run_in_the_order_of_the_edges_and_sums_meet():
    nodes = {"c": Scale(10.0), "b": Scale(3.0), "a": Scale(2.0)}
    edges = [("in", "a"), ("a", "b"), ("a", "c"), ("b", "c"), ("c", "out")]
    graph = Graph(nodes, [*edges, ("in", "out")], "in", "out")
    np.testing.assert_allclose(graph(XS), (2 + 6) * 10 * XS + XS, rtol=1e-6)


def test_a_loop_is_a_recurrent_layer():
    layer = Recurrent(LIF(v_threshold=0.4), 3, rngs=nnx.Rngs(1))
    expected = layer(XS)
    assert expected.sum() > 3 and (expected != LIF(v_threshold=0.4)(XS)).any()
    graph = with_loop(LIF(v_threshold=0.4), layer.recurrent.kernel[...])
    np.testing.assert_array_equal(graph(XS), expected)
    np.testing.assert_array_equal(jax.jit(lambda xs: graph(xs))(XS), expected)


def test_a_loop_has_the_gradient_of_a_recurrent_layer():
    layer = Recurrent(LIF(v_threshold=0.4), 3, rngs=nnx.Rngs(1))
    graph = with_loop(LIF(v_threshold=0.4), layer.recurrent.kernel[...])
    weights = jax.random.normal(jax.random.key(2), XS.shape)
    ours, theirs = (
        jax.grad(lambda xs, m=m: (m(xs) * weights).sum())(XS) for m in (graph, layer)
    )
    assert jnp.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_bias_in_the_loop_acts_from_the_first_step():
    graph = with_loop(LIF(1.0), jnp.zeros((3, 3)))
    graph.parts[0].modules[-1].bias = nnx.Param(jnp.ones(3))
    np.testing.assert_array_equal(graph(jnp.zeros((1, 3, 3))), jnp.ones((1, 3, 3)))


def test_several_neurons_on_one_loop():
    # a and b excite each other; a sees b one step late, b sees a in the same step
    nodes = {"a": LI(1.0), "fires": Threshold(1.0), "b": LI(1.0)}
    edges = [("in", "a"), ("a", "fires"), ("fires", "b"), ("b", "a"), ("b", "out")]
    graph = Graph(nodes, edges, "in", "out")
    xs = jnp.asarray([1.0, 0.0, 0.0, -1.0, 0.0])[None, :, None]
    np.testing.assert_array_equal(graph(xs)[0, :, 0], [1, 1, 1, 0, 0])


@pytest.mark.parametrize("pieces", [(1,) * 7, (3, 4)])
def test_a_loop_in_slices_is_the_whole(pieces):
    layer = Recurrent(LIF(v_threshold=0.4), 3, rngs=nnx.Rngs(1))
    graph = with_loop(LIF(v_threshold=0.4), layer.recurrent.kernel[...])
    expected = graph(XS)
    for _ in range(2):  # twice, to start from rest
        keep_membranes(graph, XS)
        ends = np.cumsum(pieces)
        parts = [graph(XS[:, e - n : e]) for n, e in zip(pieces, ends, strict=True)]
        np.testing.assert_array_equal(jnp.concatenate(parts, 1), expected)


def test_a_loop_of_itself():
    graph = Graph({"n": LI(1.0)}, [("in", "n"), ("n", "n"), ("n", "out")], "in", "out")
    xs = jnp.asarray([1.0, 2.0, 3.0])[None, :, None]
    np.testing.assert_array_equal(graph(xs)[0, :, 0], [1, 3, 6])


def test_recurrent_neurons_with_several_membranes_survive_a_round_trip():
    """All membranes get the spikes of the step before, none those of this one."""
    layer = Recurrent(MultiThreshold(3, independent), 3, rngs=nnx.Rngs(1))
    parts = (
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
        layer,
        nnx.Linear(3, 2, rngs=nnx.Rngs(2)),
    )
    model, xs = (
        nnx.Sequential(*parts),
        3 * jax.random.normal(jax.random.key(0), (3, 7, 4)),
    )
    back = from_nir(to_nir(model, xs, dt=1.0), dt=1.0)
    np.testing.assert_allclose(back(xs), model(xs), rtol=1e-5, atol=1e-6)
