"""The script that prepares image sets: what it leaves, and what it refuses."""

import pytest
import tensorflow_datasets as tfds
from tiny_pets import GREY, builder_class, grey

from experiments import prepare
from spikejax.data.images import load


@pytest.fixture
def builder(monkeypatch):
    """Has TFDS give another builder, where TensorFlow seems to be there."""

    def give(make):
        monkeypatch.setattr(tfds, "builder", lambda name, **options: make(**options))

    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)
    return give


def run(name, data_dir=None):
    prepare.main(prepare.Preparation(name, data_dir))


def test_preparing_without_tensorflow_names_the_extra(monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"In a clone: pip install -e '\.\[prepare\]'$"
    ):
        run("mnist")


def test_preparing_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match=r"got 'minst'. Did you mean mnist"):
        run("minst")


def test_what_is_prepared_can_be_loaded(builder, tmp_path, monkeypatch, capsys):
    builder(builder_class(GREY, {"train": grey(5), "test": grey(2)}))
    monkeypatch.setattr(tfds, "list_builders", lambda **_: ["tiny_pets"])
    run("tiny_pets", tmp_path)
    assert "tiny_pets is prepared in" in capsys.readouterr().out
    assert len(load("tiny_pets", tmp_path).train) == 5


@pytest.mark.parametrize("name", ["tiny_imagenet", "folder", "digits", "fake"])
def test_what_needs_no_preparing_says_so(name):
    with pytest.raises(
        ValueError, match=rf"needs no preparing. Train: --data {name}, "
    ):
        run(name)


def test_archives_that_are_fetched_by_hand_are_asked_for_in_one_line(builder):
    class Builder:
        def download_and_prepare(self):
            raise AssertionError("Manual directory\n  is empty.")

    builder(lambda **_: Builder())
    with pytest.raises(ValueError, match=r"^prepare mnist: Manual directory is empty"):
        run("mnist")


def test_a_download_that_fails_is_one_line(builder):
    def make(**_):
        raise ConnectionError("no route to host")

    builder(make)
    with pytest.raises(
        ValueError,
        match=r"^prepare mnist: no route to host\. Witho",
    ):
        run("mnist")
