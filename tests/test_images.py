"""The embedded sets, and batches: their order, resuming, what is refused."""

import itertools
import json
import multiprocessing
import os
import signal
from multiprocessing.popen_spawn_posix import Popen

import numpy as np
import pytest
from absl import flags
from orbax.checkpoint import v1 as ocp
from sklearn.datasets import load_digits

from spikejax.data import augment
from spikejax.data.augment import center_crop, inception_crop
from spikejax.data.images import eval_batches, load, sample, train_batches
from spikejax.data.split import Arrays, EncodedImages


def numbered(count, shape=(2, 2, 1)):
    """Images whose pixels are their number, and so are the labels."""
    values = np.arange(count, dtype=np.uint8)
    pixels = np.broadcast_to(values[:, None, None, None], (count, *shape))
    return Arrays(pixels.copy(), values.astype(np.int32))


def labels(batches, count=None):
    return np.concatenate([b["label"] for b in itertools.islice(batches, count)])


def noise(batch, rng):
    return rng.integers(0, 256, batch.shape, np.uint8)


# The embedded sets


def test_digits_are_scikit_learns():
    digits = load("digits")
    assert (len(digits.train), len(digits.test)) == (1500, 297)
    assert digits.shape == (8, 8, 1) and digits.num_classes == 10
    expected = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    for source, index, row in ((digits.train, 7, 7), (digits.test, 296, 1796)):
        batch = source.take([index])
        assert batch["image"].dtype == np.uint8
        scaled = expected.images[order[row]] / 16 * 255
        assert np.abs(batch["image"][0, ..., 0] - scaled).max() <= 0.5
        assert batch["label"] == expected.target[order[row]]


def test_fake_is_the_same_every_time():
    first, second = load("fake"), load("fake")
    assert first.shape == (32, 32, 3) and first.train.values.dtype == np.uint8
    assert np.array_equal(first.train.values, second.train.values)
    assert np.array_equal(first.test.labels, second.test.labels)
    assert int(first.train.values[:100].sum(dtype=np.int64)) == 39737710


def test_fake_can_be_learned():
    fake = load("fake")
    train, test = fake.train, fake.test
    pixels = train.values.astype(np.float32)
    means = np.stack([pixels[train.labels == k].mean(0) for k in range(10)])
    distance = ((test.values[:, None] - means) ** 2).mean((2, 3, 4))
    assert np.mean(distance.argmin(1) == test.labels) > 0.99


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_statistics_are_those_of_the_training_images(name):
    data = load(name)
    pixels = data.train.values / 255
    assert np.allclose(data.mean, pixels.mean((0, 1, 2)))
    assert np.allclose(data.std, pixels.std((0, 1, 2)))
    assert len(data.mean) == data.shape[-1] and len(data.class_names) == 10


# Training batches


def test_a_batch_has_images_and_labels():
    batch = next(train_batches(load("digits").train, 32, seed=0))
    assert batch["image"].shape == (32, 8, 8, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (32,) and batch["label"].dtype == np.int32


def test_image_and_label_stay_together():
    batches = train_batches(numbered(50), 10, seed=4)
    for batch in itertools.islice(batches, 12):
        assert np.array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_every_epoch_is_the_whole_set_in_a_new_order():
    epochs = labels(train_batches(numbered(50), 7, seed=0), 50).reshape(7, 50)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(50), (7, 1)))
    assert len({epoch.tobytes() for epoch in epochs}) == 7


def test_the_seed_decides():
    def epochs(seed):
        stream = labels(train_batches(numbered(50), 10, seed=seed), 25)
        return [epoch.tobytes() for epoch in stream.reshape(5, 50)]

    assert epochs(3) == epochs(3)
    assert not set(epochs(3)) & set(epochs(4))


@pytest.mark.parametrize("crop", [None, inception_crop(9)])
@pytest.mark.parametrize("count", [2, 3])
def test_the_batches_of_all_processes_are_that_of_one(count, crop):
    source, options = numbered(60, (6, 7, 3)), {"augment": noise, "crop": crop}
    whole = train_batches(source, 8 * count, seed=1, **options)
    shards = [
        train_batches(source, 8, seed=1, shard=(i, count), **options)
        for i in range(count)
    ]
    for expected in itertools.islice(whole, 5):  # over the end of an epoch
        got = [next(shard) for shard in shards]
        for key in ("image", "label"):
            assert np.array_equal(np.concatenate([b[key] for b in got]), expected[key])
    assert len({bytes(image) for image in expected["image"]}) == 8 * count


def test_shards_of_a_set_that_they_do_not_divide_lose_nothing():
    source = numbered(7)
    shards = [
        labels(train_batches(source, 2, seed=1, shard=(i, 2)), 7) for i in range(2)
    ]
    counts = np.bincount(np.concatenate(shards))
    assert np.array_equal(counts, np.full(7, 4))


@pytest.mark.parametrize(
    ("count", "labels"), [(2, [0, 3]), (4, [0, 1, 3, 5]), (9, [0, 1, 2, 3, 4, 5, 6])]
)
def test_a_sample_is_of_the_whole_set_or_all_of_it(count, labels):
    assert sample(numbered(7), count)["label"].tolist() == labels


def test_a_crop_draws_anew_for_each_image_batch_and_seed():
    source = Arrays(np.tile(numbered(1).values, (8, 8, 9, 1)), np.arange(8))
    source.values[:] = np.random.default_rng(0).integers(0, 256, (1, 16, 18, 1))

    def cropped(seed):
        batches = train_batches(source, 8, seed=seed, crop=inception_crop(6))
        images = [next(batches)["image"] for _ in range(2)]
        return [image.tobytes() for image in np.concatenate(images)]

    assert len({*cropped(0), *cropped(1)}) == 32
    assert cropped(0) == cropped(0)


def test_augmentation_differs_between_batches_seeds_and_shards():
    def batch(seed, index, shard):
        batches = train_batches(
            numbered(8), 2, seed=seed, augment=noise, shard=(shard, 2)
        )
        return next(itertools.islice(batches, index, None))["image"].tobytes()

    keys = list(itertools.product((0, 1), (0, 1, 4), (0, 1)))
    assert len({batch(*key) for key in keys}) == len(keys)
    assert batch(1, 4, 1) == batch(1, 4, 1)


def test_augmentation_does_not_reach_the_source():
    def erase(batch, rng):
        batch[:] = 0
        return batch

    source = numbered(10)
    assert not next(train_batches(source, 10, seed=0, augment=erase))["image"].any()
    assert np.array_equal(source.values, numbered(10).values)


class Halves:
    """A source of our own: every second example of another one."""

    def __init__(self, source):
        self.source, self.shape = source, source.shape

    def __len__(self):
        return len(self.source) // 2

    def cached(self):
        return self

    def take(self, indices, crop=None, rngs=None):
        return self.source.take(2 * np.asarray(indices), crop, rngs)


def test_anything_with_the_methods_of_a_source_is_one():
    batches = list(eval_batches(Halves(numbered(20)), 5))
    assert np.array_equal(labels(batches), np.arange(0, 20, 2))
    drawn = labels(train_batches(Halves(numbered(20)), 5, seed=0), 2)
    assert np.array_equal(np.sort(drawn), np.arange(0, 20, 2))


# Resuming


def test_the_iterator_goes_on_from_its_state():
    batches = train_batches(numbered(20), 6, seed=0, augment=noise)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches)["image"] for _ in range(5)]
    assert state == {"next_index": 3}

    other = train_batches(numbered(20), 6, seed=0, augment=noise)
    other.set_state(state)
    assert np.array_equal([next(other)["image"] for _ in range(5)], expected)
    batches.set_state(state)  # back, past what was read ahead
    assert np.array_equal([next(batches)["image"] for _ in range(5)], expected)


def test_orbax_saves_and_moves_the_iterator(tmp_path):
    batches = train_batches(numbered(20), 6, seed=0, augment=noise)
    next(batches), next(batches)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables(2, {"data": batches})
    expected = next(batches)["image"]

    other = train_batches(numbered(20), 6, seed=0, augment=noise)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.load_checkpointables(2, {"data": other})
    assert other.get_state() == {"next_index": 2}
    assert np.array_equal(next(other)["image"], expected)


def test_an_asynchronous_save_keeps_the_state_of_its_moment(tmp_path):
    batches = train_batches(numbered(20), 6, seed=0)
    next(batches)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        response = checkpointer.save_checkpointables_async(1, {"data": batches})
        next(batches), next(batches)
        response.result()
        checkpointer.load_checkpointables(1, {"data": batches})
    assert batches.get_state() == {"next_index": 1}


def test_the_stream_is_the_same_whatever_the_workers(monkeypatch):
    flags.FLAGS.unparse_flags()
    launch, signalled = Popen._launch, []

    def launch_and_signal(self, process):
        launch(self, process)
        os.kill(self.pid, signal.SIGTERM)  # as to the whole group: before it runs
        signalled.append(self.pid)

    monkeypatch.setattr(Popen, "_launch", launch_and_signal)

    def stream(workers):
        return train_batches(
            numbered(40), 6, seed=5, augment=augment.random_crop(1), workers=workers
        )

    here, there = stream(0), stream(2)
    expected = [next(here) for _ in range(9)]
    try:
        got = [next(there)]
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)  # and as it works
        got += [next(there) for _ in range(4)]
        here.set_state(there.get_state())  # and a run may change their number
        got += [next(here) for _ in range(4)]
    finally:
        there.close()
    for key in ("image", "label"):
        assert np.array_equal([b[key] for b in got], [b[key] for b in expected])
    assert len(signalled) == 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # this one hears them
    assert not flags.FLAGS.is_parsed()  # a program's flags are its own


# Evaluation batches


def test_evaluation_takes_each_example_once_in_order_as_often_as_wanted():
    batches = eval_batches(numbered(23), 5)
    for _ in range(2):
        assert [len(b["label"]) for b in batches] == [5, 5, 5, 5, 3]
        assert np.array_equal(labels(batches), np.arange(23))


def test_evaluation_shards_take_every_nth():
    for index in range(3):
        batches = eval_batches(numbered(23), 5, shard=(index, 3))
        assert np.array_equal(labels(batches), np.arange(23)[index::3])


def test_evaluation_may_be_one_small_batch():
    assert [len(b["label"]) for b in eval_batches(numbered(3), 100)] == [3]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("examples", [5, 8, 9, 11])
def test_evaluation_has_as_many_batches_in_every_process(examples, count):
    shards = [
        list(eval_batches(numbered(examples), 2, shard=(i, count)))
        for i in range(count)
    ]
    assert len({len(batches) for batches in shards}) == 1
    seen = np.concatenate([labels(batches) for batches in shards])
    assert np.array_equal(np.sort(seen), np.arange(examples))


def test_a_process_without_an_example_left_has_an_empty_batch():
    *_, last = eval_batches(numbered(5), 2, shard=(1, 2), crop=center_crop(4))
    assert last["image"].shape == (0, 4, 4, 1) and last["image"].dtype == np.uint8
    assert last["label"].shape == (0,) and last["label"].dtype == np.int32


def test_evaluation_crops():
    batch = next(iter(eval_batches(numbered(5), 5, crop=center_crop(7))))
    assert batch["image"].shape == (5, 7, 7, 1)
    assert np.array_equal(batch["image"][:, 3, 3, 0], np.arange(5))


# What is refused


def refused(match, batches, *args, **options):
    more = {"seed": 0} if batches is train_batches else {}
    with pytest.raises(ValueError, match=rf"^{batches.__name__}: {match}"):
        batches(*args, **more | options)


@pytest.mark.parametrize("batches", [train_batches, eval_batches])
def test_batch_sizes_shards_and_missing_crops_are_refused(batches):
    refused("expected batch_size >= 1, .* got batch_size 0,", batches, numbered(9), 0)
    for shard in ((1, 1), (-1, 2), (0, 0)):
        refused(rf".*shard \({shard[0]}, ", batches, numbered(9), 1, shard=shard)
    source = EncodedImages("photographs", 9, list, (None, None, 3), 2)
    refused("expected a crop, .* got none", batches, source, 2)


def test_more_than_the_examples_of_a_set_are_refused():
    assert len(next(train_batches(numbered(9), 9, seed=0))["label"]) == 9
    refused(".*at least 10 examples, .* and 9 ex", train_batches, numbered(9), 10)
    refused(".*at least 10", train_batches, numbered(9), 5, shard=(1, 2))
    assert len(list(eval_batches(numbered(4), 2, shard=(3, 4)))) == 1
    refused(".*at least 5 .* and 4 ex", eval_batches, numbered(4), 2, shard=(0, 5))
    with pytest.raises(ValueError, match="expected non-negative integer"):
        train_batches(numbered(9), 1, seed=-1)  # numpy's words
