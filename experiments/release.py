"""Write the network of a run into the package, its kernels in 8 bits.

    python -m experiments.release runs/fast cifar10-mt4 --command "..." --commit 0d75750

The first word is the folder of a finished run on images, the second the name for
``spikejax.pretrained``. Prints the accuracy on the test images with weights of float32
and of 8 bits, and at more time steps than it was trained for.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp

from spikejax import energy
from spikejax.data import images
from spikejax.experiment.cli import Positional, parse, run_cli
from spikejax.experiment.trained import (
    SHIPPED,
    Trained,
    evaluate,
    load_images,
    round_weights,
    save,
)

ENERGY_IMAGES = 256
MORE_STEPS = 2, 4  # times those of the training


@dataclasses.dataclass(frozen=True)
class Release:
    """A trained network, and what its files do not say."""

    network: Positional[str] = ""
    """Folder of a finished run on images."""
    name: Positional[str] = ""
    """Name of the network in the package, such as cifar10-mt4."""
    command: str = ""
    """Command of the run, for the card."""
    commit: str = ""
    """Commit that the command ran at."""
    hours: float = 0.0
    """Hours of two CPU cores that it took."""
    data_dir: Path | None = None
    """Folder of the data; TFDS's own folder by default."""

    def __post_init__(self):
        if self.name and not self.name.replace("-", "").isalnum():
            raise ValueError(
                f"name: expected letters, digits and dashes, got {self.name!r}."
            )


DEFAULT = Release()


def main(flags: Release) -> None:
    """Round the weights, evaluate them, and write card.json and weights.npz."""
    before = load_images(flags.network)
    if not flags.name:
        raise ValueError("name: expected a name for the network, got none.")
    card = before.card
    image_set = images.load(str(card.flags["data"]), flags.data_dir)

    def accuracy(trained: Trained) -> float:
        right, count = evaluate(trained, image_set)
        return right / count

    model = round_weights(before.model)
    found = {"float32": accuracy(before), "8 bits": accuracy(Trained(model, card))}
    by_steps = {}
    for factor in MORE_STEPS if card.flags["neuron"] != "relu" else ():
        steps = factor * card.flags["time_steps"]
        longer = dataclasses.replace(card, flags=card.flags | {"time_steps": steps})
        by_steps[f"T={steps}"] = accuracy(Trained(model, longer))
    raw = images.sample(image_set.test, ENERGY_IMAGES, card.crop(image_set.shape))
    spent = energy.measure(model, card.encode(jnp.asarray(raw["image"])))
    result = card.result | {
        "accuracy": found["8 bits"],
        "spikes_per_image": spent.spikes_per_image,
        "energy_nj": spent.energy_nj,
        "mac_nj": spent.mac_nj,
    }
    notes = {
        "command": flags.command,
        "commit": flags.commit,
        "hours of two CPU cores": flags.hours,
        "accuracy": found,
        "accuracy at more time steps": by_steps,
    }
    folder = SHIPPED / flags.name
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, model, dataclasses.replace(card, result=result, notes=notes))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(json.dumps(notes, indent=2))
    print(f"Written: {folder}, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
