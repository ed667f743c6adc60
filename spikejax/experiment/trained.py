"""Trained networks as two files: card.json says what they are, weights.npz has them.

A finished run has them in its folder, and the package has those of a few networks.
Neither needs the data set.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spikejax.data import speech
from spikejax.data.augment import Crop, center_crop, square_crop
from spikejax.data.files import file_reader
from spikejax.data.images import ImageSet, eval_batches
from spikejax.data.split import EncodedImages
from spikejax.encode import normalised
from spikejax.experiment.build import (
    READOUTS,
    ActivationOptions,
    MultiThresholdOptions,
    NetworkOptions,
    VGGOptions,
    build_model,
)
from spikejax.experiment.cli import override
from spikejax.train import workdir
from spikejax.train.checksum import by_path, signatures
from spikejax.train.step import Readout

SHIPPED = Path(__file__).parents[1] / "weights"
CARD, WEIGHTS, SCALE = "card.json", "weights.npz", ":scale"
BATCH = 250  # of an evaluation


@dataclasses.dataclass(frozen=True)
class Card:
    """Description of a trained network.

    flags: of its run, as in config.json.
    class_names: of its logits, in order.
    shape: [H, W, C] of an image, None where sizes differ; [F] of a step of a sequence.
    mean, std: of the channels of the training images, where white is 1, or of the
        bands of speech; None for frames of events and for other sequences, which are
        not normalised.
    result: content of result.json: accuracy, spikes and energy, versions.
    notes: what else is known of a network of the package, such as its command.
    """

    flags: dict[str, Any]
    class_names: tuple[str, ...]
    shape: tuple[int | None, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    result: dict[str, Any]
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def of_images(self) -> bool:
        """Tell if the network takes images, not frames of events or sequences."""
        return self.mean is not None and len(self.shape) == 3

    @property
    def of_speech(self) -> bool:
        """Tell if the network takes recordings of speech."""
        return self.mean is not None and "step_ms" in self.flags

    @property
    def readout(self) -> Readout:
        """Logits [B, K] of those of all time steps [B, T, K], as the run took them."""
        return READOUTS[self.flags.get("readout", "mean")]

    def read(self, files: Sequence[str | Path]) -> np.ndarray:
        """Return photographs, uint8 [B, H, W, C], or a recording of speech, [1, T, F].

        The largest square in the middle of a photograph is scaled to the size of the
        training images. Of a recording these are the log-mel frames.

        Args:
            files: JPEG, PNG, GIF or BMP of any size; of speech one WAV file, as
                recordings differ in length.

        Raises:
            ValueError: a file is missing, or of another kind; the network takes neither
                images nor speech.
        """
        if self.of_speech:
            if len(files) != 1:
                raise ValueError(
                    f"read: expected one recording at a time, as they differ in "
                    f"length, got {len(files)}."
                )
            audio, rate = speech.read_wav(files[0])
            frames = speech.log_mel(audio, rate, step_ms=self.flags["step_ms"])
            return frames[None, : self.flags["time_steps"]]  # as in training
        if not self.of_images:
            page = "sequences" if len(self.shape) == 1 else "events"
            raise ValueError(
                "read: expected a network of images or of spoken digits, got one of "
                f"{self.flags['data']}. See docs/{page}.md for its inputs."
            )
        if isinstance(files, str | Path):
            raise ValueError(f"images: expected a list of files, got {files}.")
        missing = [file for file in files if not Path(file).is_file()]
        if missing or not files:
            got = f"no file {missing[0]}" if missing else "none"
            if missing and Path(missing[0]).is_dir():
                got = f"the folder {missing[0]}, whose files are to be given"
            raise ValueError(f"images: expected files of images, got {got}.")
        paths = [str(Path(file).absolute()) for file in files]
        stored = file_reader(Path.cwd(), paths, [0] * len(files))
        unknown = (None, None, self.shape[-1] or 3)
        source = EncodedImages("images", len(files), stored, unknown, 1)
        return source.take(range(len(files)), self.crop(unknown))["image"]

    def encode(self, images: jax.Array) -> jax.Array:
        """Return the input of the network, [B, T, ...], for raw images.

        Args:
            images: uint8 [B, H, W, C] as ``read`` returns them, frames of events
                [B, T, H, W, C], or sequences [B, T, F] of any type: of speech what
                ``data.speech.log_mel`` returns.

        Raises:
            ValueError: they are of another type or size than in training.
        """
        xs = jnp.asarray(images)
        if len(self.shape) == 1:
            return self._encode_sequences(xs).astype(jnp.float32)
        side = self.flags.get("image_size")
        shape = (side, side, self.shape[-1]) if side else self.shape
        if not (self.of_images and self.mean and self.std):
            _check_input("frames", xs, ("B", "T"), shape)
            return xs.astype(jnp.float32)
        hint = "; card.read(files) returns photographs so"
        _check_input("uint8 images", xs, ("B",), shape, dtype=jnp.uint8, hint=hint)
        encode = normalised(self.mean, self.std, self.flags["time_steps"])
        return encode(xs, jax.random.key(0))

    def _encode_sequences(self, xs: jax.Array) -> jax.Array:
        if not (self.mean and self.std):
            _check_input("sequences", xs, ("B", "T"), self.shape)
            return xs
        # Of speech, before it is coded: then a step may have more features than bands.
        _check_input("sequences", xs, ("B", "T"), (len(self.mean),))
        xs = (xs - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        if self.flags["coding"] == "delta":
            coded = [speech.delta(np.asarray(x), speech.DELTA) for x in xs]
            xs = jnp.asarray(np.stack(coded))
        return xs

    def crop(self, shape: Sequence[int | None]) -> Crop | None:
        """Return the crop that gives images of a shape [H, W, C] the right size."""
        if size := self.flags.get("image_size"):
            return center_crop(size)
        height = self.shape[0]
        return square_crop(height) if height and height != shape[0] else None


@dataclasses.dataclass(frozen=True)
class _Network:
    """Flags that make a network; the groups are those that the flags select."""

    network: NetworkOptions = VGGOptions()
    activation: ActivationOptions = MultiThresholdOptions()


class Trained(NamedTuple):
    """Trained network in evaluation mode, and its card."""

    model: nnx.Module
    card: Card


def _check_input(
    kind: str,
    xs: jax.Array,
    lead: Sequence[str],
    shape: Sequence[int | None],
    *,
    dtype: Any = None,
    hint: str = "",
) -> None:
    """Refuse an input of ``Card.encode`` of another shape or type; None is any."""
    given = xs.shape[len(lead) :]
    fits = [a in (None, b) for a, b in zip(shape, given, strict=False)]
    is_kind = dtype in (None, xs.dtype)
    if not (is_kind and len(given) == len(shape) and all(fits)):
        sizes = [str(a or name) for a, name in zip(shape, "HWC", strict=False)]
        raise ValueError(
            f"encode: expected {kind} [{', '.join([*lead, *sizes])}] as in "
            f"training, got {xs.dtype} {xs.shape}. A single one is x[None]{hint}."
        )


def save(folder: Path, model: nnx.Module, card: Card) -> None:
    """Write card.json and weights.npz.

    Kernels that are whole multiples of a scale per output, as ``round_weights`` makes
    them, take 8 bits.
    """
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in _leaves(nnx.state(model)).items():
        arrays[path] = array = np.asarray(leaf)
        if array.ndim > 1:
            scale = _scale(array)
            whole = np.round(array / scale).astype(np.int8)
            if np.array_equal((whole * scale).astype(array.dtype), array):
                arrays |= {path: whole, path + SCALE: scale}
    packed: Any = arrays
    np.savez_compressed(folder / WEIGHTS, **packed)
    content = dataclasses.asdict(card) | {"sha256": _digest(folder)}
    workdir.write(folder / CARD, content)


def load(folder: Path | str) -> Trained:
    """Return the network of a finished run, without its data.

        model, card = spikejax.load("runs/mt")
        logits = model(card.encode(images)).mean(1)  # images uint8 [B, H, W, C]

    Args:
        folder: workdir of the run.

    Raises:
        ValueError: the folder has no finished run, or its files are damaged.
    """
    folder = Path(folder)
    if not (folder / CARD).exists():
        if (folder / "fit.json").exists() and not (folder / "config.json").exists():
            raise ValueError(
                f"load: expected the folder of an experiment, got {folder} of fit(), "
                "which saves no network, as it does not know how to build it. Call "
                "the same fit() again: it returns the trained model."
            )
        raise ValueError(
            f"load: expected the folder of a finished run, with {CARD}, got {folder}. "
            "Rerun its command, which finishes it. For a network of the package, "
            f"spikejax.pretrained({_shipped()[0]!r})."
        )
    try:
        content = json.loads((folder / CARD).read_text("utf-8"))
        if content.pop("sha256") != _digest(folder):
            raise ValueError(f"{WEIGHTS} is not as it was saved.")
        card = Card(**content)
        model = _build(card)
        _set(model, folder)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(
            f"load: expected the files of a trained network in {folder}, got: "
            f"{' '.join(str(error).split())} Copy it again, or rerun its command."
        ) from error
    return Trained(model, card)


def find(network: str) -> Path:
    """Return the folder of a network of the package, by its name, or of a run."""
    shipped = SHIPPED / network
    return shipped if (shipped / CARD).exists() else Path(network)


def pretrained(name: str) -> Trained:
    """Return a network that comes with the package, such as "cifar10-mt4".

    Args:
        name: see ``docs/one_step.md``; its card has the recipe, accuracy and energy.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _shipped():
        raise ValueError(
            f"pretrained: expected one of {', '.join(_shipped())}, got {name!r}. For a "
            "run of yours, spikejax.load(folder)."
        )
    return load(SHIPPED / name)


def _shipped() -> list[str]:
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CARD}"))


def round_weights(model: nnx.Module) -> nnx.Module:
    """Return a copy whose kernels are whole multiples of a scale, for 8 bits each.

    w' = s round(w / s),  s = max |w| / 127 of each output
    """
    model = nnx.clone(model)
    state = nnx.state(model)
    rounded = jax.tree.map(
        lambda v: v if v.ndim < 2 else np.round(v / _scale(v)) * _scale(v), state
    )
    nnx.update(model, rounded)
    return model


def _scale(kernel: np.ndarray) -> np.ndarray:
    axes = tuple(range(kernel.ndim - 1))
    most = np.abs(np.asarray(kernel)).max(axes).astype(np.float32)
    return np.where(most > 0, most, 1) / np.float32(127)


def load_named(network: str) -> Trained:
    """Return the network of a command line.

    Args:
        network: folder of a finished run, or the name of a network of the package.

    Raises:
        ValueError: as ``load``; there is no folder.
    """
    folder = find(network)
    if not network or not (folder / CARD).exists():
        raise ValueError(
            f"network: expected the folder of a finished run, with {CARD}, or one of "
            f"{', '.join(_shipped())}, got {network or 'none'}. Rerun the command of a "
            "run that did not finish."
        )
    return load(folder)


def load_images(network: str) -> Trained:
    """Return the network of a command line, for scripts with sets of images.

    Raises:
        ValueError: as ``load_named``; the run was not one on images.
    """
    found = load_named(network)
    if not found.card.of_images:
        raise ValueError(
            f"network: expected one of images, got {network}, of "
            f"{found.card.flags['data']}. Its accuracy is in its result.json."
        )
    return found


class Score(NamedTuple):
    """Images that the network names right, of how many."""

    right: int
    count: int


def evaluate(trained: Trained, image_set: ImageSet, *, flip: bool = False) -> Score:
    """Return how many test images a network names right; print the progress."""
    model, card = trained
    graphdef, state = nnx.split(model)

    @jax.jit
    def classify(state: nnx.State, raw: jax.Array) -> jax.Array:
        def logits(raw: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, state)(card.encode(raw)).mean(1)

        return (logits(raw) + (logits(raw[:, :, ::-1]) if flip else 0)).argmax(-1)

    right = count = 0
    crop, last = card.crop(image_set.shape), time.monotonic()
    for batch in eval_batches(image_set.test, BATCH, crop=crop):
        labels = jnp.asarray(batch["label"])
        right += int((classify(state, jnp.asarray(batch["image"])) == labels).sum())
        count += len(labels)
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"{count} images, {right / count:.2%}", flush=True)
    return Score(right, count)


def _build(card: Card) -> nnx.Module:
    """Return the network of a card in evaluation mode, with shapes for its arrays."""
    chosen = override(_Network(), card.flags)
    build = partial(
        build_model,
        chosen.network,
        chosen.activation,
        num_classes=len(card.class_names),
        in_channels=int(card.shape[-1] or 0),
        seed=card.flags["seed"],
    )
    # Initial weights, not needed here, take longer to compile than all else.
    model = nnx.eval_shape(build)
    model.eval()
    return model


def _leaves(state: nnx.State) -> dict[str, jax.Array]:
    """Return the arrays of a network by path, random keys as their data."""
    is_key = jax.dtypes.prng_key
    return {
        path: jax.random.key_data(v) if jnp.issubdtype(v.dtype, is_key) else v
        for path, v in by_path(nnx.to_pure_dict(state)).items()
    }


def _set(model: nnx.Module, folder: Path) -> None:
    """Put the arrays of weights.npz into a network."""
    state = nnx.state(model)
    expected = jax.eval_shape(_leaves, state)
    with np.load(folder / WEIGHTS, allow_pickle=False) as file:
        arrays = {path: file[path] for path in file.files}
    for path in [path for path in arrays if path.endswith(SCALE)]:
        scale, kernel = arrays.pop(path), path.removesuffix(SCALE)
        arrays[kernel] = (arrays[kernel] * scale).astype(np.float32)
    if signatures(arrays) != signatures(expected):
        raise ValueError("arrays of another network.")
    new = []
    for path, old in by_path(nnx.to_pure_dict(state)).items():  # in the tree's order
        array = jnp.asarray(arrays[path])
        is_key = jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
        new.append(jax.random.wrap_key_data(array) if is_key else array)
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), new))


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
