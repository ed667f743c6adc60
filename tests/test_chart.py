"""Charts of networks: what is drawn in them."""

import math

import numpy as np
import pytest

from spikejax.energy import Firing, Operations, Report

pytest.importorskip("matplotlib")
from spikejax import chart  # noqa: E402

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


def texts(axes):
    return [text.get_text() for text in axes.texts]


def names(axes):
    return [tick.get_text() for tick in axes.get_yticklabels()]


def test_comparison_shows_each_number(tmp_path):
    figure = chart.comparison(ROWS)
    expected = [["97.31", "99.00"], ["11.2", "9.0"], ["1,432", "0"], ["812", "9,813"]]
    assert [texts(axes) for axes in figure.axes] == expected
    points = figure.axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(points, [[97.31, 0], [99, 1]])
    bars = [[bar.get_width() for bar in axes.patches] for axes in figure.axes[1:]]
    assert bars == [[row[key] for row in ROWS] for key in list(chart.PANELS)[1:]]
    assert names(figure.axes[0]) == ["LIF", "ReLU"]
    assert figure.axes[0].yaxis_inverted()  # the first row on top
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_comparison_of_one_row_and_of_zeros():
    figure = chart.comparison([dict.fromkeys(chart.PANELS, 0.0) | {"name": "nothing"}])
    assert names(figure.axes[0]) == ["nothing"]
    for axes in figure.axes:  # each says 0, at a place that can be drawn
        assert float(axes.texts[0].get_text()) == 0
        low, high = axes.get_xlim()
        assert math.isfinite(low) and math.isfinite(high) and low < high


def test_comparison_says_what_is_missing():
    row = {k: v for k, v in ROWS[0].items() if k != "energy_nj"}
    with pytest.raises(ValueError, match="got 2 rows; missing: energy_nj"):
        chart.comparison([ROWS[0], row])
    with pytest.raises(ValueError, match="comparison: .*got 0 rows"):
        chart.comparison([])


def test_accuracy_by_steps_is_in_percent_from_step_one():
    axes = chart.accuracy_by_steps({"a": [0.5, 0.75, 1.0], "b": [0.25]})
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_xydata(), [[1, 50], [2, 75], [3, 100]])
    np.testing.assert_array_equal(second.get_xydata(), [[1, 25]])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2"]
    assert first.get_markevery() == [0, 1] and second.get_markevery() == [0]
    # Told apart without colour too.
    assert first.get_marker() != second.get_marker()
    assert chart.accuracy_by_steps({"c": [0.1]}, axes=axes) is axes


@pytest.mark.parametrize("nothing", [{}, {"a": []}])
def test_accuracy_by_steps_needs_accuracies(nothing):
    with pytest.raises(ValueError, match="accuracy_by_steps: .*got none"):
        chart.accuracy_by_steps(nothing)


def test_rates_are_bars_by_layer():
    axes = chart.rates(SPIKING)
    assert [bar.get_width() for bar in axes.patches] == [0.25, 1.5]
    assert texts(axes) == ["0.250", "1.500"]
    assert names(axes) == ["neurons/0", "neurons/1"] and axes.yaxis_inverted()
    assert chart.rates(SPIKING, axes=axes) is axes


def test_rates_need_neurons():
    with pytest.raises(ValueError, match="rates: .*spiking neurons, got none"):
        chart.rates(SILENT)


def test_energy_bars_are_stacked_and_sum_up():
    axes = chart.energy_bars({"spiking": SPIKING, "ReLU": SILENT})
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    spikes, rest = 0.9 * 2000 / 1000, 4.6 * 1000 / 1000
    np.testing.assert_allclose(bars, [(0, spikes), (0, 0), (spikes, rest), (0, 92.0)])
    assert texts(axes) == ["6.4", "92.0"]
    assert SPIKING.energy_nj == pytest.approx(spikes + rest)
    assert names(axes) == ["spiking", "ReLU"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["accumulates (spikes)", "multiply-accumulates"]
    assert chart.energy_bars({"spiking": SPIKING}, axes=axes) is axes


def test_energy_bars_need_a_report():
    with pytest.raises(ValueError, match="energy_bars: .*got none"):
        chart.energy_bars({})
