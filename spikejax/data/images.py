"""Image sets by name (TFDS's, Tiny-ImageNet, folders) and Grain batches of them.

Reading needs no TensorFlow; preparing a TFDS set does: see experiments/prepare.py.
"""

import dataclasses
import os
import sys

import grain
import numpy as np

from spikejax.data.augment import Augment
from spikejax.data.crop import Crop
from spikejax.data.files import FileSet, image_folder, tiny_imagenet
from spikejax.data.split import ArrayImages, EncodedImages, Source, take
from spikejax.data.tfds import prepared_builder, tfds_split

# Mean and standard deviation of the channels of the training images, in 0..1.
PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, as is usual
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


# Each 8 images have random numbers of their own, wherever they are made: one by one
# would be slower, and larger groups would seldom divide the batch of a process.
AUGMENTED_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A labelled image set: two splits and what a model has to know about them.

    shape is [H, W, C]; H and W are None where images have sizes of their own, and
    batches need a crop. mean and std are of the training images, per channel, where
    white is 1.
    """

    name: str
    train: Source
    test: Source
    shape: tuple[int | None, int | None, int]
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageSet:
    """The image set of that name, decoded only when it is read.

    Args:
        name: "digits" (scikit-learn's, 8x8x1, mixed once: 1,500 to train, 297 to test),
            "fake" (made up, 32x32x3), "tiny_imagenet" (its zip), "folder" (of JPEGs:
            train/CLASS/*.JPEG, val/CLASS/*.JPEG), or a TFDS image-classification set
            prepared as array_record: "cifar10", "imagenet2012", "mnist_corrupted/fog".
        data_dir: the folder of the zip, of train and val, or TFDS's; None is TFDS's
            default.

    Returns:
        The set. mean and std are the known ones of CIFAR-10 and CIFAR-100, ImageNet's
        where images have sizes of their own, and else those of up to 2,048 training
        images, evenly spread. A test split whose labels are kept back (as ImageNet's)
        gives way to the validation split.
    """
    if name == "digits":
        return _digits()
    if name == "fake":
        return _fake()
    if name == "tiny_imagenet":
        return _files(name, tiny_imagenet(data_dir))
    if name == "folder":
        return _files(name, image_folder(data_dir))
    return _tfds(name, data_dir)


def train_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    crop: Crop | None = None,
    augment: Augment | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> "TrainBatches":
    """Endless shuffled batches, a function of seed and place alone.

    Each epoch is a new order of the whole set; a batch may reach from one epoch into
    the next. The batches of all processes, one below the other, are the batch that one
    process would draw, so a run may go on with more or fewer; augmented too, if each
    has a multiple of 8 examples. A split that fits is decoded here, so that what is
    wrong with it is said at once.

    Args:
        source: the examples, by index.
        batch_size: examples a batch in this process.
        seed: of order, crop and augmentation, >= 0.
        crop: of each image, see spikejax.data.crop; needed where sizes vary.
        augment: of the cropped images, see spikejax.data.augment.
        workers: processes beside this one; 0 makes batches in a thread. Worth
            their start of seconds only where decoding or augmentation is slow.
        shard: (process index, number of processes).

    Returns:
        An iterator over {"image": uint8 [B, H, W, C], "label": int32 [B]}.
    """
    _check("train_batches", source, batch_size, crop, shard)
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
    # Grain shuffles epoch e by seed + e: unmixed, seeds 0 and 1 would share epochs.
    order = grain.MapDataset.range(len(source)).shuffle(_mix(seed)).repeat()

    def make(step: int) -> dict[str, np.ndarray]:
        first = (step * count + index) * batch_size  # place in the stream
        places = range(first, first + batch_size)
        rngs = [np.random.default_rng((seed, 1, p)) for p in places if crop]
        batch = take(source, np.array([order[p] for p in places]), crop, rngs)
        if augment is not None:
            batch["image"] = _augmented(batch["image"], augment, seed, first)
        return batch

    return TrainBatches(grain.MapDataset.range(sys.maxsize).map(make), workers)


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    crop: Crop | None = None,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset[dict[str, np.ndarray]]:
    """Batches of each example once, in order; the last one may be smaller.

    Every process has the same number of batches. The last of some may therefore have
    an example less than that of others, and so even none ([0, H, W, C]).

    Args:
        source: the examples, by index; at least one for each process.
        batch_size: examples a batch in this process.
        crop: of each image, see spikejax.data.crop; needed where sizes vary.
        shard: (process index, number of processes); takes every count-th example.

    Returns:
        An iterable, as often as wanted, over batches as of train_batches.
    """
    _check("eval_batches", source, batch_size, crop, shard)
    index, count = shard
    if len(source) < count:
        raise ValueError(
            f"eval_batches: expected an example or more for each of the {count} "
            f"processes, got {len(source)}. Take fewer processes."
        )
    source = _ready(source)

    def make(step: int) -> dict[str, np.ndarray]:
        mine = range(index, len(source), count)
        indices = mine[step * batch_size : (step + 1) * batch_size]
        if indices:
            return take(source, indices, crop)
        return {name: a[:0] for name, a in take(source, [0], crop).items()}

    steps = -(-len(source) // (batch_size * count))
    return grain.MapDataset.range(steps).map(make).to_iter_dataset(_READ_AHEAD)


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
    if isinstance(source, EncodedImages) and source.fits:
        return source.in_memory
    return source


def _augmented(
    images: np.ndarray, augment: Augment, seed: int, first: int
) -> np.ndarray:
    """The augmented images, of which the first has this place in the stream."""
    parts = [
        augment(
            images[i : i + AUGMENTED_AT_ONCE],
            np.random.default_rng((seed, 2, first + i)),
        )
        for i in range(0, len(images), AUGMENTED_AT_ONCE)
    ]
    return np.concatenate(parts)


def _mix(seed: int) -> int:
    """32 bits that depend on all of the seed."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _check(
    who: str,
    source: Source,
    batch_size: int,
    crop: Crop | None,
    shard: tuple[int, int],
) -> None:
    index, count = shard
    if isinstance(source, EncodedImages) and source.varies and crop is None:
        raise ValueError(
            f"{who}: expected a crop for {source.name}, whose images have sizes of "
            "their own, got none. Give an image size, such as 224."
        )
    if batch_size < 1:
        raise ValueError(
            f"{who}: expected batch_size >= 1, got {batch_size}. Take 1 to "
            f"{len(source)}."
        )
    if not 0 <= index < count:
        raise ValueError(
            f"{who}: expected shard (index, count) with 0 <= index < count, got "
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


def _files(name: str, found: FileSet) -> ImageSet:
    train, test, names = found
    mean, std = PHOTOGRAPHS if train.varies else _statistics(train)
    return ImageSet(name, train, test, train.shape, len(names), names, mean, std)


def _tfds(name: str, data_dir: str | os.PathLike[str] | None) -> ImageSet:
    builder = prepared_builder(name, data_dir)
    there = [s for s in ("train", "test", "validation") if s in builder.info.splits]
    if "train" not in there or len(there) < 2:
        raise ValueError(
            f"{name}: expected the splits train and test or validation, got "
            f"{', '.join(builder.info.splits) or 'none'}. Take another set."
        )
    train, test, *more = (tfds_split(name, builder, split) for split in there)
    if more and test.records.read([0])[0].label < 0:
        test = more[0]
    label = builder.info.features["label"]
    mean, std = STATISTICS.get(builder.name) or (
        PHOTOGRAPHS if train.varies else _statistics(train)
    )
    names = tuple(label.names)
    return ImageSet(name, train, test, train.shape, label.num_classes, names, mean, std)
