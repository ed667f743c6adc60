"""Figures: what is drawn, and that it can be written."""

import math

import numpy as np
import pytest

from spikejax import neurons
from spikejax.layers import LIF, MultiThreshold, keep_membranes

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


def curves(axes):
    return {line.get_label(): line.get_xydata().T for line in axes.lines}


def test_accuracy_bars_show_each_number(tmp_path):
    figure = plot.accuracy_bars(ROWS)
    shown = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    expected = [["97.31", "99.00"], ["11.2", "9.0"], ["1,432", "0"], ["812", "9,813"]]
    assert shown == expected
    bars = [[bar.get_width() for bar in axes.patches] for axes in figure.axes[1:]]
    assert bars == [[row[key] for row in ROWS] for key in list(plot.PANELS)[1:]]
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["LIF", "ReLU"]
    assert figure.axes[0].yaxis_inverted()  # the first row on top
    figure.savefig(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_accuracy_bars_of_one_row_and_of_zeros():
    plot.accuracy_bars([dict.fromkeys(plot.PANELS, 0.0) | {"name": "nothing"}])


def test_accuracy_bars_say_what_is_missing():
    row = {k: v for k, v in ROWS[0].items() if k != "energy_nj"}
    with pytest.raises(ValueError, match="got 2 rows; missing: energy_nj"):
        plot.accuracy_bars([ROWS[0], row])
    with pytest.raises(ValueError, match="got 0 rows"):
        plot.accuracy_bars([])


def test_response_is_a_staircase():
    axes = plot.response(MultiThreshold(4, tau=2.0))
    (output,) = curves(axes).values()
    x, y = output
    np.testing.assert_array_equal(y, np.clip(x // 2, 0, 4))
    assert x.min() < 0 and x.max() > 8
    assert axes.get_title(loc="left") == "MultiThreshold, parallel, N=4"


def test_response_shows_the_spikes_where_they_are_not_the_output():
    layer = MultiThreshold((1.0, 0.5), neurons.cascade, tau=math.inf, decay_input=False)
    both = curves(plot.response(layer))
    x, output = both["output"]
    np.testing.assert_array_equal(output, np.clip(x // 0.5, 0, 3) / 2)
    spikes = np.select([x < 0.5, x < 1.5], [0, 1], 2)  # 1.0 fires the first alone
    np.testing.assert_array_equal(both["number of spikes"][1], spikes)


def test_response_starts_from_rest_and_moves_no_membrane():
    layer = keep_membranes(LIF())
    layer(np.full((1, 1), 1.0, np.float32))
    held = np.array(layer.membrane[...])
    axes = plot.response(LIF())
    assert plot.response(layer, axes=axes) is axes
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_ydata(), second.get_ydata())
    np.testing.assert_array_equal(layer.membrane[...], held)
