"""Image sets by name (TFDS's, Tiny-ImageNet, folders) and Grain batches of them.

Reading needs no TensorFlow; preparing a TFDS set does: see experiments/prepare.py.
"""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import grain
import numpy as np

from spikejax.data import tfds
from spikejax.data.augment import Augment, Crop
from spikejax.data.files import image_folder, tiny_imagenet
from spikejax.data.split import Arrays, Batch, Folder, Shape, Source, Splits

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
Shard = tuple[int, int]  # (process index, number of processes)

# Mean and standard deviation of the channels of the training images, in 0..1.
PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, as is usual
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}

# Random numbers of the augmentation are drawn per group of 8 images, not per image:
# with Grain's random_map and batch, image by image, crop and flip of CIFAR-10 make 0.33
# times as many images per second of processor time, AutoAugment 0.72, inception crops
# of photographs 0.35 to 0.57. Larger groups would seldom divide a process's batch.
GROUP = 8

# Grain's default would hold 500 batches. A second thread is no faster: decoding has its
# own threads, and most of the rest holds the interpreter's lock.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A labelled image set: two splits, and what a model and its input need.

    mean and std are those of the channels of the training images, where white is 1.
    """

    train: Source
    test: Source
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> Shape:
        """Shape of an image, [H, W, C]; H and W are None if the sizes differ."""
        return self.train.shape

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load(name: str, data_dir: Folder = None) -> ImageSet:
    """Return the image set of that name; images are decoded when they are drawn.

    Args:
        name: "digits" (scikit-learn's, 8x8x1, shuffled once: 1,500 to train, 297 to
            test), "fake" (synthetic, 32x32x3), "tiny_imagenet" (its zip), "folder" (of
            JPEGs: train/CLASS/*.JPEG, val/CLASS/*.JPEG), the path of such a folder with
            a slash, as in "photos/", or a TFDS image-classification
            set prepared as array_record: "cifar10", "imagenet2012",
            "mnist_corrupted/fog".
        data_dir: the folder of the zip, of train and val, or TFDS's; None is TFDS's
            default.

    Returns:
        The set. mean and std are the published ones of CIFAR-10 and CIFAR-100,
        ImageNet's if the images have different sizes, and else those of up to 2,048
        training images, evenly spaced. If the labels of the test split are withheld (as
        ImageNet's are), the validation split takes its place.

    Raises:
        ValueError: the set is unknown, not there, or damaged, or a path has a data_dir
            too.
    """
    # TFDS has names such as a/b, none of which ends so.
    if name.endswith("/") or ("/" in name and Path(name).is_dir()):
        if data_dir is not None:
            raise ValueError(
                f"data: expected the path of a folder without --data-dir, got {name} "
                f"and {data_dir}. Leave --data-dir out, or give --data folder "
                "--data-dir PATH."
            )
        splits = image_folder(name)
    elif name in OWN:
        splits = OWN[name](data_dir)
    else:
        splits = tfds.prepared_set(name, data_dir)
    train, test, class_names = splits
    usual = PHOTOGRAPHS if None in train.shape else STATISTICS.get(name)
    mean, std = usual or _statistics(train)
    return ImageSet(train, test, class_names, mean, std)


def train_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    crop: Crop | None = None,
    augment: Augment | None = None,
    workers: int = 0,
    shard: Shard = (0, 1),
) -> "TrainBatches":
    """Return endless shuffled batches that depend on seed and position alone.

    Each epoch is a new order of the whole set; a batch can contain examples of two
    epochs. The batches of all processes, concatenated, are the batch that one process
    would draw, so a run can be resumed with another number of processes; with
    augmentation, too, if batch_size is a multiple of 8. A split that fits into memory
    is decoded here.

    Args:
        source: the examples, by index.
        batch_size: examples per batch of this process.
        seed: seed of order, crop and augmentation, >= 0.
        crop: crop of each image; needed if their sizes differ.
        augment: augmentation of the cropped images.
        workers: worker processes; 0 makes the batches in a thread. Starting one takes
            seconds, which pays only if decoding or augmentation is slow.
        shard: (process index, number of processes).

    Returns:
        An iterator over {"image": uint8 [B, H, W, C], "label": int32 [B]}.

    Raises:
        ValueError: an argument out of range, no crop for images of different sizes, or
            a damaged file.
    """
    index, count = shard
    _check("train_batches", source, batch_size, batch_size * count, crop, shard)
    source = source.cached()

    def rngs(use: int, places: range) -> list[np.random.Generator]:
        return [np.random.default_rng((seed, use, place)) for place in places]

    def make(batch: int, rows: np.ndarray) -> Batch:
        first = batch * batch_size  # position in the stream of all processes
        places = range(first, first + batch_size)
        made = source.take(rows, crop, rngs(1, places) if crop else None)
        if augment is not None:
            groups = np.split(made["image"], range(GROUP, batch_size, GROUP))
            parts = map(augment, groups, rngs(2, places[::GROUP]))
            made["image"] = np.concatenate(list(parts))
        return made

    # Grain shuffles epoch e with seed + e: unmixed, seeds 0 and 1 would share epochs.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    stream = grain.MapDataset.range(len(source)).shuffle(mixed).repeat()
    stream = stream.batch(batch_size, batch_fn=np.array).map_with_index(make)
    # Of each step's `count` batches this process takes its own. Slicing before batch
    # would interleave the processes' examples, in another order than one process's.
    return TrainBatches(stream[index::count], workers)


def eval_batches(
    source: Source, batch_size: int, *, crop: Crop | None = None, shard: Shard = (0, 1)
) -> grain.IterDataset[Batch]:
    """Return batches of each example once, in order; the last one can be smaller.

    Every process has the same number of batches, as each of them is one collective
    step. The last batch of some processes therefore has fewer examples, or none
    ([0, H, W, C]).

    Args:
        source: the examples, by index; at least one per process.
        batch_size, crop, shard: as in `train_batches`; a process takes every
            count-th example.

    Returns:
        An iterable over such batches, which can be iterated several times.

    Raises:
        ValueError: as in `train_batches`.
    """
    index, count = shard
    _check("eval_batches", source, batch_size, count, crop, shard)
    source = source.cached()

    def make(step: int) -> Batch:
        rows = range(index, len(source), count)
        rows = rows[step * batch_size : (step + 1) * batch_size]
        # A batch without examples gets the shape of its images from the first one.
        batch = source.take(rows or [0], crop)
        return {name: array[: len(rows)] for name, array in batch.items()}

    steps = -(-len(source) // (batch_size * count))
    return grain.MapDataset.range(steps).map(make).to_iter_dataset(_READ_AHEAD)


def sample(source: Source, count: int, crop: Crop | None = None) -> Batch:
    """Return evenly spaced examples as one batch: of all classes of a sorted set.

    Args:
        source: the examples, by index.
        count: how many, >= 1; all if there are fewer.
        crop: as in `train_batches`.
    """
    count = min(count, len(source))
    return source.take(np.arange(count) * len(source) // count, crop)


class TrainBatches(grain.DatasetIterator):
    """Iterator over an endless dataset; its state is the number of batches taken.

    Grain's own state depends on the number of workers. This one does not, so a run can
    be resumed with another number of them.
    """

    def __init__(self, dataset: grain.MapDataset[Batch], workers: int = 0):
        super().__init__()
        self._dataset = dataset
        self._workers = workers
        self._next_index = 0
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._open()
        with _block_signals() if self._workers else contextlib.nullcontext():
            batch = next(self._iterator)  # the first ones start the workers
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the state, which Orbax saves and set_state takes."""
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        """Move to the position where get_state was called, forwards or back."""
        self.close()
        self._next_index = state["next_index"]

    def close(self) -> None:
        """Stop threads and workers; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def _open(self) -> grain.DatasetIterator:
        rest = self._dataset[self._next_index :].to_iter_dataset(_READ_AHEAD)
        if not self._workers:
            return iter(rest)
        from absl import flags

        # Grain reads a flag of its own here, which fails in programs that do not use
        # absl. As Grain does in its workers, we mark this flag as given; the flags of
        # the program are not parsed.
        profiling = "grain_enable_multiprocess_worker_profiling"
        if profiling in flags.FLAGS:
            flags.FLAGS[profiling].present = True
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
        return iter(rest.mp_prefetch(options))


@contextlib.contextmanager
def _block_signals() -> Iterator[None]:
    """Leave signals to the main process, which saves, and then stops the workers.

    Ctrl-C, the end of a terminal and the end of a job go to the whole group. Threads
    and processes inherit the block, so it holds from a worker's first instruction on.
    """
    # In Python 3.11, the start of this process unblocks what was blocked before.
    resource_tracker.ensure_running()
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check(
    who: str, source: Source, size: int, needed: int, crop: Crop | None, shard: Shard
) -> None:
    if None in source.shape and crop is None:
        raise ValueError(
            f"{who}: expected a crop, as the images of this set have different sizes, "
            "got none. Give an image size, such as 224."
        )
    index, count = shard
    if size < 1 or not 0 <= index < count or needed > len(source):
        raise ValueError(
            f"{who}: expected batch_size >= 1, shard (process, processes) with 0 <= "
            f"process < processes, and at least {needed} examples, got batch_size "
            f"{size}, shard {shard} and {len(source)} examples. Take a smaller "
            "batch (--batch-size), or shard=(0, 1) for one process."
        )


def _statistics(source: Source) -> Statistics:
    """Return mean and deviation per channel of up to 2,048 images, evenly spaced."""
    rows = np.unique(np.linspace(0, len(source) - 1, 2048).astype(int))
    pixels = source.take(rows)["image"] / 255.0
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    # One grey level at least: a constant channel must not divide by zero.
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


def _digits(_: Folder) -> Splits:
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    # In scikit-learn's order the last digits are by other writers: shuffle them once.
    order = np.random.default_rng(0).permutation(len(targets))
    pixels = np.reshape(pixels, (-1, 8, 8, 1))[order]
    images = np.round(pixels * (255 / 16)).astype(np.uint8)
    return _in_memory(images, np.asarray(targets)[order], 1500)


def _fake(_: Folder) -> Splits:
    """Return ten coarse colour patterns, each image with noise of half its contrast."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(64, 192, (10, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    labels = rng.integers(0, 10, 2560)
    noise = rng.integers(-64, 64, (2560, 32, 32, 3))
    return _in_memory((patterns[labels] + noise).astype(np.uint8), labels, 2048)


def _in_memory(images: np.ndarray, labels: np.ndarray, count: int) -> Splits:
    train = Arrays(images[:count], labels[:count])
    test = Arrays(images[count:], labels[count:])
    return train, test, tuple("0123456789")


OWN = dict(zip(tfds.OWN, (_digits, _fake, tiny_imagenet, image_folder), strict=True))
