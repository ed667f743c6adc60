"""Networks from NIR: graphs that other libraries wrote, and what cannot be read."""

import re
import zlib
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest

from spikejax.layers import IF, LI, LIF, Neuron, neuron_layers
from spikejax.nir.neurons import EXPONENTIAL, Dialect
from spikejax.nir.read import NORSE, ROCKPOOL, SINABS, SNNTORCH, STANDARD, from_nir
from spikejax.nn.cells import CubaLIF

GOLDEN = Path(__file__).parent / "golden"
DT = 1e-3


@pytest.mark.parametrize(
    ("library", "dt", "dialect", "kinds"),
    [
        ("spikingjelly", 1e-4, STANDARD, {LIF, IF}),
        ("spikingjelly_cuba", 1e-4, STANDARD, {Neuron}),
        ("snntorch", 1e-4, SNNTORCH, {Neuron}),
        ("snntorch_recurrent", 1e-4, SNNTORCH, {Neuron}),
        ("snntorch_synaptic", 1e-4, SNNTORCH, {Neuron}),
        ("norse", 1e-3, NORSE, {LIF, IF, LI}),
        ("norse_cuba", 1e-3, NORSE, {CubaLIF}),
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


def euler(i):
    """LIF of Norse, snnTorch, Lava and SpiNNaker2 in the paper of NIR."""
    v, zs = 0.0, []
    for x in i:
        v += 0.04 * (x - v)
        zs.append(v > 0.1)
        v *= not zs[-1]
    return zs


def exact(i):
    """LIF of Nengo, for a current that is constant in each step."""
    v, zs = 0.0, []
    for x in i:
        v = x + (v - x) * np.exp(-0.04)
        zs.append(v > 0.1)
        v *= not zs[-1]
    return zs


def rockpool(i):
    """LIFNeuronTorch with max_spikes_per_dt=1, after weights of 0.04."""
    v, zs = 0.0, []
    for x in i:
        v = v * np.exp(-0.04) + 0.04 * x
        zs.append(v > 0.1)
        v -= 0.1 * zs[-1]
    return zs


# The network of the paper: one LIF with tau = 2.5 ms, and steps of 0.1 ms; r as its
# writers have it, Norse and Rockpool.
@pytest.mark.parametrize(
    ("r", "weight", "dialect", "simulate"),
    [
        (1.0, 1.0, STANDARD, euler),
        (1.0, 1.0, Dialect(EXPONENTIAL), exact),
        (25 * np.exp(-0.04), 0.04, ROCKPOOL, rockpool),
    ],
)
def test_the_lif_of_the_paper_fires_as_in_its_simulators(r, weight, dialect, simulate):
    rng = np.random.default_rng(3)
    xs = 4.0 * (rng.random(1000) < 0.08)
    lif = nir.LIF(*np.array([[2.5e-3], [r], [0.0], [0.1], [0.0]]))
    nodes = {"a": nir.Linear(np.full((1, 1), weight)), "b": lif}
    model = from_nir(graph_of(nodes, PAIR, size=1), dt=1e-4, dialect=dialect)
    zs = np.asarray(model(jnp.asarray(xs[None, :, None], jnp.float32)))[0, :, 0]
    assert zs.sum() > 5 and np.array_equal(zs, simulate(xs))


def test_a_current_of_rockpool_decays_in_its_own_step():
    dt, threshold = 1e-4, np.array([1.5, 1.0])
    tau_syn, tau_mem = np.array([5e-4, 1e-3]), np.array([2e-3, 7e-4])
    kept, alpha = np.exp(-dt / tau_syn), np.exp(-dt / tau_mem)
    cuba = nir.CubaLIF(tau_syn, tau_mem, tau_mem * alpha / dt, np.zeros(2), threshold)
    xs = 0.5 * (np.random.default_rng(0).random((40, 2)) < 0.2)
    v, current, expected = 0.0, 0.0, []
    for x in xs:  # LIFTorch with max_spikes_per_dt=1
        current = (current + x) * kept
        v = v * alpha + current
        expected.append(v > threshold)
        v = v - threshold * expected[-1]
    model = from_nir(graph_of({"a": cuba}, LINE), dt=dt, dialect=ROCKPOOL)
    assert 0.2 < np.mean(expected) < 0.8
    np.testing.assert_array_equal(
        model(jnp.asarray(xs, jnp.float32)[None])[0], expected
    )


def test_a_readout_of_rockpool_decays_after_its_current():
    tau = np.array([2e-3, 5e-3])
    decay = np.exp(-1e-4 / tau)
    nodes = {"a": nir.LI(tau, tau * decay / 1e-4, np.zeros(2))}
    xs = np.random.default_rng(0).random((1, 20, 2))
    v, expected = 0.0, []
    for x in xs[0]:  # ExpSynTorch
        v = (v + x) * decay
        expected.append(v)
    ys = from_nir(graph_of(nodes, LINE), dt=1e-4, dialect=ROCKPOOL)(jnp.asarray(xs))
    np.testing.assert_allclose(ys[0], expected, rtol=1e-5)


def graph_of(nodes, edges, size=2):
    ends = {"in": nir.Input({"input": np.array([size])})}
    ends["out"] = nir.Output({"output": np.array([size])})
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
            {"a": nir.Delay(np.ones(2))},
            LINE,
            "expected nodes that spikejax has, got 'a', a Delay. It has Affine",
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


# Files from outside


UNEVEN = nir.Scale(np.arange(1.0, 3.0))
PAIR = [("in", "a"), ("a", "b"), ("b", "out")]


@pytest.fixture
def saved(tmp_path):
    """A graph of two nodes in a file."""
    nodes = {"a": nir.Linear(np.eye(2, dtype=np.float32)), "b": UNEVEN}
    nir.write(tmp_path / "a.nir", graph_of(nodes, PAIR))
    assert from_nir(tmp_path / "a.nir", dt=DT)
    return tmp_path / "a.nir"


def changed(saved, change):
    with h5py.File(saved, "r+") as file:
        change(file["node/nodes/a"])
    with pytest.raises(ValueError) as caught:
        from_nir(saved, dt=DT)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"from_nir: {saved}: expected ")
    return message


def replace(name, value, **options):
    def change(node):
        del node[name]
        node.create_dataset(name, data=value, **options)

    return change


def outside(kind):
    def change(node):
        other = str(Path(node.file.filename).parent / "other")
        del node["weight"]
        if kind == "external link":
            node["weight"] = h5py.ExternalLink(other, "/weight")
        elif kind == "soft link":
            node["weight"] = h5py.SoftLink("/version")
        elif kind == "external storage":
            storage = [(other, 0, h5py.h5f.UNLIMITED)]
            node.create_dataset("weight", (2, 2), np.float32, external=storage)
        else:
            layout = h5py.VirtualLayout((2, 2), np.float32)
            layout[:] = h5py.VirtualSource(other, "weight", (2, 2))
            node.create_virtual_dataset("weight", layout)

    return change


@pytest.mark.parametrize(
    "kind", ["external link", "soft link", "external storage", "virtual dataset"]
)
def test_data_of_other_files_are_not_read(saved, kind):
    assert "a link out of the file at 'weight'" in changed(saved, outside(kind))


def loop(node):
    node["again"] = node.parent


def twice(node):
    node["again"] = node["weight"]


def nested(node):
    for _ in range(2000):
        node = node.create_group("g")


def bomb(times):
    """A chunk of 16 bytes that unpacks to 32 MB."""

    def change(node):
        del node["weight"]
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk((2, 2))
        data = bytes(2**25)
        for _ in range(times):
            made.set_filter(h5py.h5z.FILTER_DEFLATE, 0, (9,))
            data = zlib.compress(data)
        space = h5py.h5s.create_simple((2, 2))
        kind = h5py.h5t.IEEE_F32LE
        weight = h5py.h5d.create(node.id, b"weight", kind, space, made)
        weight.write_direct_chunk((0, 0), data)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bomb(1), "a chunk of more than 16 bytes"),
        (bomb(2), "data packed 2 times"),
        (loop, "a loop, or more than .* bytes, at 'again'"),
        (twice, "a loop, or more than"),
        (nested, "got RecursionError"),
        (
            lambda node: node.create_dataset("x", (2**30,), "f4"),
            "more than 67.* at 'x'",
        ),
        (
            lambda node: node.create_dataset("x", (2**25,), "f4", compression="gzip"),
            "more than 67",
        ),
        (lambda node: node.pop("weight"), "got TypeError: .* missing 1 .* 'weight'"),
        (lambda node: node.pop("type"), "got .*Error"),
        (replace("weight", np.eye(3)), "got TypeError: dot_general requires"),
        (replace("weight", np.zeros((2, 0))), "got .*Error"),
        (replace("weight", "text"), "got .*Error"),
        (replace("type", "Conv2d"), "got TypeError: .* missing 6"),
        (replace("type", "Nothing"), "got AssertionError"),
        (replace("type", "Delay"), "got .*Error"),
    ],
)
def test_damaged_graphs_are_one_line(saved, change, message):
    assert re.search(message, changed(saved, change))


def test_files_that_are_no_graph_are_one_line(tmp_path):
    for name, content in (("none", None), ("text", b"text"), ("empty", b"")):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^from_nir: {path}: expected a graph"):
            from_nir(path, dt=DT)


def test_shapes_of_a_graph_in_memory_have_to_fit():
    nodes = {"a": nir.Linear(np.ones((3, 2))), "b": UNEVEN}
    with pytest.raises(ValueError, match="^from_nir: expected .* shapes fit, got Val"):
        from_nir(graph_of(nodes, PAIR), dt=DT)
