"""Training: what is refused before any work, and batches that cannot be trained on."""

import jax
import numpy as np
import pytest
from test_train import SGD, Data, fit, saved

from spikejax.train import TrainConfig


def relabel(label):
    def act(batch):
        return batch | {"label": np.where(batch["label"] == 3, label, batch["label"])}

    return act


def shorter(batch):
    return {name: values[:-8] for name, values in batch.items()}


SIZE = "batches of 24, as TrainConfig.batch_size says, got one of 16. Drop what is left"
LABELS = (
    "labels from 0 to 9, as the model has 10 logits, got {}. Give the model a logit"
)
ENDLESS = "batches of image and label without an end, got {}. A dataset of Grain goes"


@pytest.mark.parametrize(
    "act, message",
    [
        (relabel(-1), LABELS.format(-1)),
        (relabel(10), LABELS.format(10)),
        (lambda batch: {}, ENDLESS.format("no more")),
        (lambda batch: tuple(batch.values()), ENDLESS.format("tuple")),
        (lambda batch: {"x": 0} | {"label": 0}, ENDLESS.format("x, label")),
        (shorter, SIZE),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_an_error(tmp_path, act, message):
    with pytest.raises(ValueError, match=f"fit: expected {message}"):
        fit(tmp_path, data=Data(SGD, 4, act))
    assert saved(tmp_path) == [3]


def test_a_batch_that_the_devices_cannot_share_is_an_error(tmp_path):
    if jax.device_count() != 8:
        pytest.skip("other devices may share it")
    with pytest.raises(ValueError, match="a multiple of the 8 device.*, got 9. Take 8"):
        fit(tmp_path / "new", TrainConfig(steps=2, batch_size=9))
    assert not (tmp_path / "new").exists()


ORBAX = r"without \*, \? and \[, .*, got .*another"
GRAIN = "an iterator of Grain, as iter.dataset. gives, got list_iterator"


@pytest.mark.parametrize(
    "name, data, message",
    [
        *((name, None, ORBAX) for name in ("net[4]", "what?", "*")),
        ("", iter([]), GRAIN),
    ],
)
def test_folders_and_data_are_refused_before_any_work(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "new" / name, data=data)
    assert not (tmp_path / "new").exists()
