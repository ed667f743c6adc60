"""Pictures of neurons and charts of networks: what is drawn in them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spikejax import neurons
from spikejax.energy import Firing, Operations, Report
from spikejax.layers import IF, LI, LIF, MultiThreshold
from spikejax.memory import keep_membranes
from spikejax.nn.cells import ALIF, CubaLIF
from spikejax.nn.quant import QuantReLU, ScaledIF

pytest.importorskip("matplotlib")
from spikejax import plot  # noqa: E402

ROWS = [
    {
        "name": "LIF",
        "accuracy": 0.9731,
        "seconds": 11.23,
        "spikes_per_image": 1432.3,
        "energy_nj": 812.5,
    },
    {
        "name": "ReLU",
        "accuracy": 0.99,
        "seconds": 9.0,
        "spikes_per_image": 0,
        "energy_nj": 9812.6,
    },
]
SPIKING = Report(
    (Firing("neurons/0", 0.25, 100.0), Firing("neurons/1", 1.5, 600.0)),
    (Operations("convs/0", 0.0, 1000.0, 2000.0), Operations("head", 2000.0, 0.0, 3000)),
)
SILENT = Report((), (Operations("head", 0.0, 20_000.0, 20_000.0),))


def curves(axes):
    """{label: (x, y)} of the lines that the legend would show."""
    return {
        line.get_label(): np.asarray(line.get_xydata()).T
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def if_neurons(thresholds=1, cell=neurons.parallel, **options):
    options = {"tau": math.inf, "decay_input": False} | options
    return MultiThreshold(thresholds, cell, **options)


def test_raster_has_a_dot_for_each_neuron_that_fires(tmp_path):
    spikes = np.array([[0, 1, 0], [2, 0, 0], [0, 4, 1]])
    axes = plot.raster(spikes)
    (dots,) = axes.collections
    np.testing.assert_array_equal(dots.get_offsets(), [[1, 1], [2, 0], [3, 1], [3, 2]])
    np.testing.assert_array_equal(dots.get_array(), [1, 2, 4, 1])
    small, middle, large, same = dots.get_sizes()
    assert same == small < middle < large
    assert legend(axes) == [f"$\\mathdefault{{{n}}}$" for n in (1, 2, 4)]
    assert axes.get_xlim() == (0.5, 3.5)
    axes.figure.savefig(tmp_path / "raster.png")


def test_a_notebook_shows_the_figure():
    png = plot.raster(np.eye(3)).figure._repr_png_()
    assert png.startswith(b"\x89PNG") and len(png) > 3000


def test_raster_takes_layers_of_any_shape_and_silent_ones():
    spikes = np.zeros((5, 2, 3, 4))
    axes = plot.raster(spikes)
    assert len(axes.collections[0].get_offsets()) == 0 and axes.get_legend() is None
    assert axes.get_ylim() == (-0.7, 23.7)
    spikes[4, 1, 2, 3] = 1
    axes = plot.raster(spikes)
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), [[5, 23]])
    assert axes.get_legend() is None


@pytest.mark.parametrize("shape", [(5,), (0, 3), (5, 0)])
def test_raster_needs_time_and_neurons(shape):
    with pytest.raises(ValueError, match=r"raster: .*\[T, ...\], got shape .*spikes"):
        plot.raster(np.zeros(shape))


def test_membrane_rises_by_the_input_and_drops_by_the_reset():
    axes = plot.membrane(if_neurons(3), [0.5, 2.0, 0.25])
    lines = curves(axes)
    np.testing.assert_array_equal(lines["membrane"][0], [0, 1, 1, 2, 2, 3, 3])
    # u = 0.5, then 2.5 fires twice and leaves 0.5, then 0.75.
    np.testing.assert_array_equal(
        lines["membrane"][1], [0, 0.5, 0.5, 2.5, 0.5, 0.75, 0.75]
    )
    np.testing.assert_array_equal(lines["spikes"][0], [2])
    dashed = [line for line in axes.lines if line.get_ls() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [1, 2, 3]
    dots = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [[2], [2], []]  # a row a threshold
    assert min(lines["spikes"][1]) > 3
    assert legend(axes) == ["thresholds", "membrane", "spikes"]


def test_membrane_with_hard_reset_starts_and_ends_at_it():
    axes = plot.membrane(LIF(2.0, 1.0, v_reset=-0.5), [3.5, 0.0])
    # u = -0.5 + (3.5 - 0) / 2 = 1.25 fires; then from -0.5 it stays there.
    np.testing.assert_array_equal(
        curves(axes)["membrane"][1], [-0.5, 1.25, -0.5, -0.5, -0.5]
    )
    assert legend(axes) == ["threshold", "membrane", "spikes"]


def test_membrane_of_equal_thresholds_is_one_dashed_line():
    axes = plot.membrane(if_neurons(4, neurons.cascade), [2.5])
    assert sum(line.get_ls() == "--" for line in axes.lines) == 1
    np.testing.assert_array_equal(curves(axes)["membrane"][1], [0, 2.5, 0.5])


def test_membrane_draws_one_line_a_membrane():
    axes = plot.membrane(if_neurons((1.0, 2.0), neurons.independent), [1.5])
    lines = curves(axes)
    np.testing.assert_array_equal(lines["membrane 1"][1], [0, 1.5, 0.5])
    np.testing.assert_array_equal(lines["membrane 2"][1], [0, 1.5, 1.5])


def test_membrane_of_a_converted_neuron_is_in_thresholds():
    axes = plot.membrane(ScaledIF(4.0, 2), [2.0])
    # From 1/2 the input counts twice, in units of the threshold: 1/2 + 2 * 1/2.
    np.testing.assert_allclose(curves(axes)["membrane"][1], [0.5, 1.5, 0.5])


def test_membrane_leaves_the_layer_and_draws_where_it_is_told():
    layer = keep_membranes(LIF(), jnp.zeros((1, 1)))
    layer(jnp.ones((1, 1)))
    held = np.array(layer.memory.held[0][...])
    axes = plot.membrane(LIF(), [1.0, 1.5])
    assert plot.membrane(layer, [1.0, 1.5], axes=axes) is axes
    first, second = [line for line in axes.lines if line.get_label() == "membrane"]
    np.testing.assert_array_equal(first.get_xydata(), second.get_xydata())
    np.testing.assert_array_equal(layer.memory.held[0][...], held)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_membrane_takes_one_current(shape):
    with pytest.raises(ValueError, match=r"membrane: .*one neuron, \[T\], got shape"):
        plot.membrane(LIF(), np.zeros(shape))


def test_response_is_a_staircase():
    axes = plot.response(MultiThreshold(4, tau=2.0))
    (output,) = curves(axes).values()
    x, y = output
    np.testing.assert_array_equal(y, np.clip(x // 2, 0, 4))
    assert x.min() < 0 and x.max() > 8
    assert axes.get_title(loc="left") == "MultiThreshold, parallel, N=4"


def test_response_shows_the_spikes_where_they_are_not_the_output():
    layer = if_neurons((1.0, 0.5), neurons.cascade)
    both = curves(plot.response(layer))
    x, output = both["output"]
    np.testing.assert_array_equal(output, np.clip(x // 0.5, 0, 3) / 2)
    spikes = np.select([x < 0.5, x < 1.5], [0, 1], 2)  # 1.0 fires the first alone
    np.testing.assert_array_equal(both["number of spikes"][1], spikes)


def test_response_compares_by_name_on_one_range_of_inputs():
    # Parallel and cascade answer alike from rest, where their levels are equal.
    named = {"parallel": if_neurons(3), "cascade": if_neurons(3, neurons.cascade)}
    axes = plot.response(named | {"one": IF()})
    lines = curves(axes)
    assert list(lines) == legend(axes) == ["parallel", "cascade", "one"]
    np.testing.assert_array_equal(lines["parallel"], lines["cascade"])
    x, one = lines["one"]
    np.testing.assert_array_equal(one, x >= 1)
    assert x.max() > 3
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3


def test_response_starts_from_rest_and_moves_no_membrane():
    layer = keep_membranes(LIF(), jnp.zeros((1, 1)))
    layer(np.full((1, 1), 1.0, np.float32))
    held = np.array(layer.memory.held[0][...])
    axes = plot.response(LIF())
    assert plot.response(layer, axes=axes) is axes
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_ydata(), second.get_ydata())
    np.testing.assert_array_equal(layer.memory.held[0][...], held)


def test_staircase_of_p_steps_is_the_quantised_relu():
    quant = QuantReLU(2, scale=0.5, noise=1.0, rngs=nnx.Rngs(noise=3))
    before = quant.rngs.count[...]
    axes = plot.staircase(quant)
    lines = curves(axes)
    assert list(lines) == legend(axes)
    assert legend(axes) == [
        "quantised ReLU, p=3",
        "its mean with noise",
        *(f"IF neuron, T={steps}" for steps in (1, 3, 8)),
    ]
    x, y = lines["quantised ReLU, p=3"]
    np.testing.assert_allclose(y, 0.5 * np.clip(np.round(x / 0.5), 0, 3))
    # The inputs at the edge of a stair are rounded either way.
    inside = np.abs(x / 0.5 % 1 - 0.5) > 1e-3
    np.testing.assert_allclose(lines["IF neuron, T=3"][1][inside], y[inside], atol=1e-6)
    for steps in (1, 8):
        levels = np.clip(np.floor(x * steps / 1.5 + 0.5), 0, steps) * 1.5 / steps
        inside = np.abs(x * steps / 1.5 % 1 - 0.5) > 1e-3
        rate = lines[f"IF neuron, T={steps}"][1]
        np.testing.assert_allclose(rate[inside], levels[inside], atol=1e-6)
    # Noise makes the mean straight; its error is 0.5 s / sqrt(4,000) at most.
    x, mean = lines["its mean with noise"]
    np.testing.assert_allclose(mean, np.clip(x, 0, 1.5), atol=5 * 0.004)
    assert quant.rngs.count[...] == before and not quant.deterministic


def test_staircase_without_noise_and_with_other_steps():
    axes = plot.staircase(QuantReLU(3), (2,))
    assert legend(axes) == ["quantised ReLU, p=7", "IF neuron, T=2"]
    assert plot.staircase(QuantReLU(1), axes=axes) is axes


def texts(axes):
    return [text.get_text() for text in axes.texts]


def names(axes):
    return [tick.get_text() for tick in axes.get_yticklabels()]


def test_comparison_shows_each_number(tmp_path):
    figure = plot.comparison(ROWS)
    expected = [["97.31", "99.00"], ["11.2", "9.0"], ["1,432", "0"], ["812", "9,813"]]
    assert [texts(axes) for axes in figure.axes] == expected
    points = figure.axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(points, [[97.31, 0], [99, 1]])
    bars = [[bar.get_width() for bar in axes.patches] for axes in figure.axes[1:]]
    assert bars == [[row[key] for row in ROWS] for key in list(plot.PANELS)[1:]]
    assert names(figure.axes[0]) == ["LIF", "ReLU"]
    assert figure.axes[0].yaxis_inverted()  # the first row on top
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_comparison_of_one_row_and_of_zeros():
    figure = plot.comparison([dict.fromkeys(plot.PANELS, 0.0) | {"name": "nothing"}])
    assert names(figure.axes[0]) == ["nothing"]
    for axes in figure.axes:  # each says 0, at a place that can be drawn
        assert float(axes.texts[0].get_text()) == 0
        low, high = axes.get_xlim()
        assert math.isfinite(low) and math.isfinite(high) and low < high


def test_comparison_names_what_is_missing():
    row = {k: v for k, v in ROWS[0].items() if k != "energy_nj"}
    with pytest.raises(KeyError, match="energy_nj"):
        plot.comparison([ROWS[0], row])


def test_accuracy_by_steps_is_in_percent_from_step_one():
    axes = plot.accuracy_by_steps({"a": [0.5, 0.75, 1.0], "b": [0.25]})
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[1, 50], [2, 75], [3, 100]])
    np.testing.assert_array_equal(second.get_xydata(), [[1, 25]])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2"]
    assert first.get_markevery() == [0, 1] and second.get_markevery() == [0]
    # Told apart without colour too.
    assert first.get_marker() != second.get_marker()
    assert plot.accuracy_by_steps({"c": [0.1]}, axes=axes) is axes


def test_rates_are_bars_by_layer():
    axes = plot.rates(SPIKING)
    assert [bar.get_width() for bar in axes.patches] == [0.25, 1.5]
    assert texts(axes) == ["0.250", "1.500"]
    assert names(axes) == ["neurons/0", "neurons/1"] and axes.yaxis_inverted()
    assert plot.rates(SPIKING, axes=axes) is axes


def test_rates_need_neurons():
    with pytest.raises(ValueError, match="rates: .*spiking neurons, got none"):
        plot.rates(SILENT)


def test_energy_bars_are_stacked_and_sum_up():
    axes = plot.energy_bars({"spiking": SPIKING, "ReLU": SILENT})
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    spikes, rest = 0.9 * 2000 / 1000, 4.6 * 1000 / 1000
    np.testing.assert_allclose(bars, [(0, spikes), (0, 0), (spikes, rest), (0, 92.0)])
    assert texts(axes) == ["6.4", "92.0"]
    assert SPIKING.energy_nj == pytest.approx(spikes + rest)
    assert names(axes) == ["spiking", "ReLU"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["accumulates (spikes)", "multiply-accumulates"]
    assert plot.energy_bars({"spiking": SPIKING}, axes=axes) is axes


def test_a_response_has_the_size_of_a_spike():
    for layer, top in ((ScaledIF(10.0, 2), 10), (ScaledIF(0.1, 2), 0.1)):
        (line, *_) = plot.response(layer).lines[-1:]
        assert line.get_ydata().max() == pytest.approx(top, rel=1e-5)
        assert line.get_xdata().max() == pytest.approx(1.2 * top, rel=1e-5)


@pytest.mark.parametrize(
    "layer", [LI(), ALIF(), CubaLIF()], ids=lambda v: type(v).__name__
)
def test_membranes_of_other_neurons_are_refused(layer):
    with pytest.raises(ValueError, match="^membrane: expected .* such as LIF or"):
        plot.membrane(layer, jnp.ones(4))
    if isinstance(layer, LI):
        with pytest.raises(ValueError, match="expected spiking neurons, .* LI"):
            plot.response(layer)
    else:
        plot.response(layer)


def test_a_picture_is_of_one_neuron():
    several = MultiThreshold(4, v_threshold=jnp.ones(8)), LIF(tau=jnp.full(8, 2.0))
    for layer in several:
        message = r"expected one neuron, got a .* with parameters of shape \(8,\)"
        with pytest.raises(ValueError, match="response: " + message):
            plot.response(layer)
        with pytest.raises(ValueError, match="membrane: " + message):
            plot.membrane(layer, jnp.ones(5))
