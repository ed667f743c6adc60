"""EfficientNet-lite and files of torch.save: those of efficientnet-lite-pytorch."""

import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.seeded import images, weights

from spikejax.models import efficientnet
from spikejax.models.pretrained import load_efficientnet
from spikejax.models.torch_file import read_torch
from spikejax.nn import cpu

FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(FOLDER / "efficientnet.npz")
SHAPES = [tuple(map(int, shape.split())) for shape in GOLDEN["shapes"]]


def relu6():
    return nnx.relu6


def empty(classes=10, make=efficientnet.lite0):
    """The network with shapes for weights."""
    return nnx.eval_shape(
        lambda: make(classes, neuron=relu6, conv=cpu.Conv, rngs=nnx.Rngs(0))
    )


@pytest.fixture(scope="module")
def state():
    return weights(list(map(str, GOLDEN["names"])), SHAPES, int(GOLDEN["seed"]))


def test_lite0_answers_as_there(state):
    """On 60 pixels, which become 15 and then 8: the padding is not symmetric."""
    model = load_efficientnet(empty(), state)
    graphdef, arrays = nnx.split(model)
    image = np.resize(images(int(GOLDEN["seed"])), (1, 3, 60, 60))
    xs = jnp.asarray(np.moveaxis(image, 1, -1))[:, None]
    answer = jax.jit(lambda arrays, xs: nnx.merge(graphdef, arrays)(xs))
    expected = GOLDEN["logits"]
    np.testing.assert_allclose(answer(arrays, xs)[:, 0], expected, atol=1e-3)


def test_other_weights(state):
    with pytest.raises(ValueError, match=r"load_efficientnet: .* 2 other: _fc.weight"):
        load_efficientnet(empty(11), state)
    with pytest.raises(ValueError, match="load_efficientnet: expected the weights of"):
        load_efficientnet(empty(10, efficientnet.lite1), state)


@pytest.mark.parametrize(("width", "depth"), [(0, 1), (1, -1.0)])
def test_factors(width, depth):
    with pytest.raises(ValueError, match=f"width > 0 and depth > 0, got {width} and"):
        efficientnet.EfficientNet(width, depth, 3, neuron=relu6, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["state.pth", "state_old.pth"])
def test_both_formats_of_torch(name):
    """The tensors of golden/make_efficientnet.py."""
    found = read_torch(FOLDER / name)
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "table": table,
        "transposed": table.T[1:],  # a view with an offset
        "count": np.array(7),
        "half": np.array([0.5, -2], np.float16),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 2), np.float32),
    }
    assert list(found) == list(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].dtype == array.dtype and found[key].shape == array.shape


class Evil:
    """What a pickle of unknown origin may do."""

    def __reduce__(self):
        return print, ("executed",)


def zipped(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    for write in (Path.write_bytes, zipped):
        write(path, pickle.dumps(Evil(), 2))
        message = "read_torch: expected a file of torch.save .*print in it. Save model"
        with pytest.raises(ValueError, match=message):
            read_torch(path)
    assert "executed" not in capsys.readouterr().out


def damaged(name, old, new):
    content = (FOLDER / name).read_bytes()
    assert old in content
    return content.replace(old, new)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no weights",
        pickle.dumps({"a": 1}, 2),
        # A storage of more numbers than the file has bytes.
        damaged("state_old.pth", b"cpuq\x06K\x0c", b"cpuq\x06M\xff\xff"),
        # A tensor that reaches beyond its storage.
        damaged("state_old.pth", b"QK\x00K\x03K\x04\x86", b"QK\x07K\x03K\x04\x86"),
        (FOLDER / "state_old.pth").read_bytes()[:-4],
    ],
)
def test_damaged_files(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"read_torch: expected .* got .*weights.pth:"):
        read_torch(path)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="read_torch: .* got .*none.pth"):
        read_torch(tmp_path / "none.pth")
