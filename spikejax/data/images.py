"""Image sets by name (any prepared TFDS set, digits, fake) and Grain batches of them.

Reading needs no TensorFlow; preparing a TFDS set does: see experiments/prepare.py.
"""

import dataclasses
import os
from collections.abc import Sequence

import grain
import numpy as np

from spikejax.data.augment import Augment
from spikejax.data.sources import (
    ArrayImages,
    Source,
    TfdsImages,
    check_files,
    prepared_builder,
)

# Mean and standard deviation of the channels of the training images, in 0..1.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A labelled image set: two splits and what a model has to know about them.

    mean and std are of the training images, per channel, where white is 1.
    """

    name: str
    train: Source
    test: Source
    shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageSet:
    """The image set of that name, decoded only when it is read.

    Args:
        name: "digits" (scikit-learn's, 8x8x1, mixed once: 1,500 to train, 297 to test),
            "fake" (made up, 32x32x3), or a TFDS image-classification set
            prepared as array_record: "cifar10", "mnist", "mnist_corrupted/spatter".
        data_dir: TFDS's folder; None is TFDS's default.

    Returns:
        The set. mean and std are the known ones of CIFAR-10 and CIFAR-100, for others
        those of up to 2,048 training images, evenly spread.
    """
    if name == "digits":
        return _digits()
    if name == "fake":
        return _fake()
    return _tfds(name, data_dir)


def train_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    augment: Augment | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> "TrainBatches":
    """Endless shuffled batches, a function of seed and shard alone.

    Each epoch is a new order of the whole set, of which shard (index, count) takes
    every count-th example; a batch may reach from one epoch into the next. A split
    that fits is decoded here, so that what is wrong with it is said at once.

    Args:
        source: the examples, by index.
        batch_size: examples a batch in this process.
        seed: of order and augmentation, >= 0.
        augment: see spikejax.data.augment.
        workers: processes beside this one; 0 makes them in a thread. Worth
            their start of seconds only where decoding or augmentation is slow.
        shard: (process index, number of processes).

    Returns:
        An iterator over {"image": uint8 [B, H, W, C], "label": int32 [B]}.
    """
    _check(source, batch_size, shard)
    index, count = shard
    if batch_size * count > len(source):
        raise ValueError(
            f"train_batches: expected a batch no larger than the set, got batch_size "
            f"{batch_size} x {count} processes and {len(source)} examples. "
            "Take a smaller batch."
        )
    if seed < 0 or workers < 0:
        raise ValueError(
            f"train_batches: expected seed and workers >= 0, got {seed} and {workers}."
        )
    source = _ready(source)

    def make(indices: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        batch = take(source, indices)
        if augment is not None:
            batch["image"] = augment(batch["image"], rng)
        return batch

    # Grain shuffles epoch e by seed + e: unmixed, seeds 0 and 1 would share epochs.
    order_seed, augment_seed = _mix(seed), _mix(seed, index + 1)
    order = grain.MapDataset.range(len(source)).shuffle(order_seed).repeat()
    batches = order[index::count].batch(batch_size)
    return TrainBatches(batches.random_map(make, seed=augment_seed), workers)


def eval_batches(
    source: Source, batch_size: int, *, shard: tuple[int, int] = (0, 1)
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Batches of each example once, in order; the last one may be smaller.

    Args:
        source: the examples, by index.
        batch_size: examples a batch in this process.
        shard: (process index, number of processes); takes every count-th example, so
            the last processes may have one example, and so one batch, less.

    Returns:
        An iterable, as often as wanted, over batches as of train_batches.
    """
    _check(source, batch_size, shard)
    source = _ready(source)
    index, count = shard
    order = grain.MapDataset.range(index, len(source), count)
    batches = order.batch(batch_size).map(lambda indices: take(source, indices))
    return batches.to_iter_dataset(_READ_AHEAD)


def take(source: Source, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """The examples at these indices as one batch."""
    if isinstance(source, ArrayImages):
        return {"image": source.images[indices], "label": source.labels[indices]}
    if isinstance(source, TfdsImages):
        examples = source.examples(indices)
    else:
        examples = [source[int(i)] for i in indices]
    shapes = {example["image"].shape for example in examples}
    if len(shapes) > 1:
        raise ValueError(
            f"take: expected images of one shape, got {sorted(shapes)}. "
            "Resize them first."
        )
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
    }


class TrainBatches(grain.DatasetIterator):
    """Iterator over an endless dataset; its state is the number of batches taken.

    Grain's own state differs with the number of workers; this one does not, so a run
    may go on with more or fewer.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int = 0):
        super().__init__()
        self._dataset = dataset
        self._workers = workers
        self._next_index = 0
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        iterator = self._open() if self._iterator is None else self._iterator
        self._iterator = iterator
        batch = next(iterator)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """What set_state takes, and Orbax saves."""
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to where get_state was called, forwards or back."""
        self.close()
        self._next_index = state["next_index"]

    def close(self) -> None:
        """Stops threads and workers; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def _open(self) -> grain.DatasetIterator:
        rest = self._dataset[self._next_index :].to_iter_dataset(_READ_AHEAD)
        if not self._workers:
            return iter(rest)
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads its own from there
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
        return iter(rest.mp_prefetch(options))


# Grain's own choice would be to hold 500 batches. More threads are no faster: most of
# the work holds the interpreter's lock.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def _ready(source: Source) -> Source:
    """The source to draw batches from: in memory, if it fits there."""
    if isinstance(source, TfdsImages) and source.fits:
        return source.in_memory
    return source


def _mix(*entropy: int) -> int:
    """32 bits that depend on all the numbers."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _check(source: Source, batch_size: int, shard: tuple[int, int]) -> None:
    index, count = shard
    if batch_size < 1:
        raise ValueError(
            f"batches: expected batch_size >= 1, got {batch_size}. Take 1 to "
            f"{len(source)}."
        )
    if not 0 <= index < count:
        raise ValueError(
            f"batches: expected shard (index, count) with 0 <= index < count, got "
            f"{shard}. For one process: shard=(0, 1)."
        )


def _statistics(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of up to 2,048 images, evenly spread."""
    rows = np.unique(np.linspace(0, len(source) - 1, 2048).astype(int))
    pixels = take(source, rows)["image"] / 255.0
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    # One grey level at least: what is constant must not become a division by zero.
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    # In scikit-learn's order the last digits are by other writers; mix them once.
    order = np.random.default_rng(0).permutation(len(targets))
    pixels = np.reshape(pixels, (-1, 8, 8, 1))[order]
    images = np.round(pixels * (255 / 16)).astype(np.uint8)
    labels = np.asarray(targets, np.int32)[order]
    train = ArrayImages(images[:1500], labels[:1500])
    test = ArrayImages(images[1500:], labels[1500:])
    return _in_memory("digits", train, test)


def _fake() -> ImageSet:
    """Ten coarse colour patterns, each half drowned in noise of its own per image."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(64, 192, (10, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    labels = rng.integers(0, 10, 2560).astype(np.int32)
    noise = rng.integers(-64, 64, (2560, 32, 32, 3))
    images = (patterns[labels] + noise).astype(np.uint8)
    train = ArrayImages(images[:2048], labels[:2048])
    return _in_memory("fake", train, ArrayImages(images[2048:], labels[2048:]))


def _in_memory(name: str, train: ArrayImages, test: ArrayImages) -> ImageSet:
    """A set of the ten classes 0 to 9."""
    names = tuple(str(digit) for digit in range(10))
    shape = train.images.shape[1:]
    return ImageSet(name, train, test, shape, 10, names, *_statistics(train))


def _tfds(name: str, data_dir: str | os.PathLike[str] | None) -> ImageSet:
    builder = prepared_builder(name, data_dir)
    splits = builder.info.splits
    held_out = "test" if "test" in splits else "validation"
    for split in ("train", held_out):
        if split not in splits:
            raise ValueError(
                f"{name}: expected the splits train and test or validation, got "
                f"{', '.join(splits) or 'none'}. Take another set."
            )
        check_files(name, builder, split)
    train, test = TfdsImages(builder, "train"), TfdsImages(builder, held_out)
    label = builder.info.features["label"]
    mean, std = STATISTICS.get(builder.name) or _statistics(train)
    names = tuple(label.names)
    return ImageSet(name, train, test, train.shape, label.num_classes, names, mean, std)
