"""Measure the accuracy of a trained network on the test images.

    python -m experiments.evaluate runs/mt
    python -m experiments.evaluate runs/mt --data-dir DIR --flip

The first word is the folder of a finished run on images. --data takes another set of as
many classes, --flip the mean over each image and its mirror image.
"""

import dataclasses
from pathlib import Path

from spikejax.data import images
from spikejax.experiment.cli import Positional, parse, run_cli
from spikejax.experiment.trained import evaluate, load_images


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A trained network, and the images that it is shown."""

    network: Positional[str] = ""
    """Folder of a finished run on images."""
    data: str | None = None
    """Image set, by default that of the run."""
    data_dir: Path | None = None
    """Folder of the set; TFDS's own folder by default."""
    flip: bool = False
    """Take the mean of the logits over each image and its mirror image."""


DEFAULT = Evaluation()


def main(flags: Evaluation) -> None:
    """Evaluate the network that the command line names."""
    trained = load_images(flags.network)
    card = trained.card
    own = str(card.flags["data"])
    image_set = images.load(flags.data or own, flags.data_dir)
    found = image_set.num_classes, image_set.shape[-1]
    if found != (len(card.class_names), card.shape[-1]):
        raise ValueError(
            f"data: expected a set of {len(card.class_names)} classes and "
            f"{card.shape[-1]} channels, as the network has, got {flags.data or own}, "
            f"which has {found[0]} and {found[1]}."
        )
    right, count = evaluate(trained, image_set, flip=flags.flip)
    if "accuracy" in card.result and not flags.flip and flags.data in (None, own):
        print(f"its card says {card.result['accuracy']:.2%}")
    print(f"accuracy {right / count:.2%} of {count:,} images")


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
