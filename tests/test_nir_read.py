"""Networks from NIR: graphs that other libraries wrote, and what cannot be read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest

from spikejax.layers import IF, LI, LIF, Neuron, neuron_layers
from spikejax.nir.read import NORSE, SINABS, SNNTORCH, STANDARD, from_nir

GOLDEN = Path(__file__).parent / "golden"
DT = 1e-3


@pytest.mark.parametrize(
    ("library", "dt", "dialect", "kinds"),
    [
        ("spikingjelly", 1e-4, STANDARD, {LIF, IF}),
        ("snntorch", 1e-4, SNNTORCH, {Neuron}),
        ("snntorch_recurrent", 1e-4, SNNTORCH, {Neuron}),
        ("norse", 1e-3, NORSE, {LIF, IF, LI}),
        ("sinabs", 1.0, SINABS, {LIF, IF, LI}),
    ],
)
def test_graphs_of_other_libraries_answer_as_there(library, dt, dialect, kinds):
    model = from_nir(GOLDEN / f"nir_{library}.nir", dt=dt, dialect=dialect)
    with np.load(GOLDEN / "nir_graphs.npz") as saved:
        xs, ys = (np.moveaxis(saved[f"{library}/{k}"], 0, 1) for k in ("xs", "ys"))
    xs = jnp.asarray(np.moveaxis(xs, 2, -1), jnp.float32)
    neurons = {type(layer) for layer in neuron_layers(model).values()}
    assert neurons == kinds and np.abs(ys).max() > 0.02
    np.testing.assert_allclose(jax.jit(lambda xs: model(xs))(xs), ys, atol=1e-6)


def test_a_dialect_matters():
    with np.load(GOLDEN / "nir_graphs.npz") as saved:
        xs = jnp.asarray(np.moveaxis(saved["snntorch_recurrent/xs"], 0, 1), jnp.float32)
    path = GOLDEN / "nir_snntorch_recurrent.nir"
    ours = from_nir(path, dt=1e-4)(xs)
    assert (ours != from_nir(path, dt=1e-4, dialect=SNNTORCH)(xs)).any()


def graph_of(nodes, edges):
    ends = {"in": nir.Input({"input": np.array([2])})}
    ends["out"] = nir.Output({"output": np.array([2])})
    return nir.NIRGraph(ends | nodes, edges, type_check=False)


def scale(value):
    return nir.Scale(np.full(2, value))


def test_a_graph_in_a_graph_becomes_part_of_it():
    inner = graph_of(
        {"a": scale(2.0), "b": scale(3.0)},
        [("in", "a"), ("in", "b"), ("a", "out"), ("b", "out")],
    )
    outer = graph_of(
        {"g": inner, "c": scale(10.0)},
        [("in", "g"), ("g", "c"), ("c", "out"), ("g", "out")],
    )
    xs = jnp.asarray([[[1.0, 2.0]]])
    model = from_nir(outer, dt=DT)
    assert {name for group in model.groups for name in group} == {"g.a", "g.b", "c"}
    np.testing.assert_allclose(model(xs), 55 * xs)


LINE = [("in", "a"), ("a", "out")]


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        (
            {"a": nir.CubaLIF(*np.ones((5, 2)))},
            LINE,
            "expected nodes that spikejax has, got 'a', a CubaLIF. It has Affine",
        ),
        ({"a": nir.Linear(np.ones((2, 2, 2)))}, LINE, "'a', a Linear. .* of a matrix"),
        (
            {"a": nir.Flatten({"input": np.array([2, 3, 3])}, 1, 2)},
            LINE,
            "'a', a Flatten. .* of all axes",
        ),
        ({"a": scale(1.0)}, [("in", "out")], "lead from 'in' to every node .* to 'a'"),
        ({"a": scale(1.0)}, [("in", "a")], "on to 'out', got none to 'out'"),
        ({"a": scale(1.0)}, [*LINE, ("b", "a")], "got none to 'b'"),
        (
            {"a": scale(1.0), "more": nir.Input({"input": np.array([2])})},
            LINE,
            "expected a graph with one Input node, got 2: in, more",
        ),
    ],
)
def test_graphs_that_cannot_be_read(nodes, edges, message):
    with pytest.raises(ValueError, match=f"from_nir: .*{message}"):
        from_nir(graph_of(nodes, edges), dt=DT)


def test_dt_is_positive():
    with pytest.raises(
        ValueError, match="from_nir: expected dt > 0 in seconds, .* got dt=-1"
    ):
        from_nir(graph_of({"a": scale(1.0)}, LINE), dt=-1)


def test_a_dialect_is_not_a_name():
    message = ".* dialect such as spikejax.nir.SINABS, .* dialect='sinabs'"
    with pytest.raises(ValueError, match=f"from_nir: {message}"):
        from_nir(graph_of({"a": scale(1.0)}, LINE), dt=DT, dialect="sinabs")
