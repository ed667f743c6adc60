"""Name what is on photographs, with the spikes and the energy that it takes.

    python -m experiments.predict runs/mt cat.jpg dog.png
    python -m experiments.predict runs/mt cat.jpg --picture cat-named.png

The first word is the folder of a finished run on images. --picture draws the images
with their names.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spikejax import energy
from spikejax.experiment.cli import Positional, parse, run_cli
from spikejax.experiment.trained import Trained, load_images

TOP = 3  # names of an image


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A trained network, and the files that it is shown."""

    network: Positional[str] = ""
    """Folder of a finished run on images."""
    images: Positional[tuple[str, ...]] = ()
    """Files: JPEG, PNG, GIF or BMP."""
    picture: Path | None = None
    """File to draw them into, with their names."""


DEFAULT = Prediction()


class Named(NamedTuple):
    """Names of an image, and what they cost.

    names: (class, probability), the most probable first. spikes, energy_nj: per image.
    """

    file: str
    names: list[tuple[str, float]]
    spikes: float
    energy_nj: float


def predict(trained: Trained, files: Sequence[str]) -> tuple[np.ndarray, list[Named]]:
    """Return images as the network sees them, uint8 [B, H, W, C], and their names.

    Raises:
        ValueError: a file is missing, or no image.
    """
    model, card = trained
    seen = card.read(files)
    xs = card.encode(jnp.asarray(seen))
    probabilities = np.asarray(jax.nn.softmax(model(xs).mean(1)))
    rows = []
    for k, file in enumerate(files):
        best = np.argsort(-probabilities[k])[:TOP]
        names = [(card.class_names[i], float(probabilities[k, i])) for i in best]
        spent = energy.measure(model, xs[k : k + 1])
        rows.append(Named(file, names, spent.spikes_per_image, spent.energy_nj))
    return seen, rows


def draw(seen: np.ndarray, rows: Sequence[Named], path: Path) -> None:
    """Draw the images with their names, and write the picture."""
    from spikejax.plot import Picture

    figure = Picture(figsize=(2.6 * len(rows), 3.5), layout="constrained")
    panels: Any = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, image, row in zip(panels, seen, rows, strict=True):
        axes.imshow(image.squeeze(), cmap="gray" if image.shape[-1] == 1 else None)
        axes.axis("off")
        lines = [f"{name} {chance:.0%}" for name, chance in row.names]
        axes.set_title("\n".join(lines), fontsize=10)
    figure.savefig(path, dpi=120)


def main(flags: Prediction) -> None:
    """Name the images of the command line."""
    trained = load_images(flags.network)
    seen, rows = predict(trained, flags.images)
    for row in rows:
        names = ", ".join(f"{name} {chance:.1%}" for name, chance in row.names)
        cost = f"{row.spikes:,.0f} spikes, {row.energy_nj:,.0f} nJ"
        print(f"{row.file}: {names} ({cost})")
    if flags.picture:
        draw(seen, rows, flags.picture)
        print(f"Written: {flags.picture}")


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
