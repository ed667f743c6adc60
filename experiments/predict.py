"""Name what is on photographs or in recordings, with the spikes and energy it takes.

    python -m experiments.predict runs/mt cat.jpg dog.png
    python -m experiments.predict runs/mt cat.jpg --picture cat-named.png
    python -m experiments.predict runs/speech seven.wav

The first word is the folder of a finished run on images or on spoken digits. --picture
draws what the network was shown, with the names.
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
from spikejax.experiment.trained import Trained, load_named

TOP = 3  # names of an image


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A trained network, and the files that it is shown."""

    network: Positional[str] = ""
    """Folder of a finished run on images or spoken digits."""
    files: Positional[tuple[str, ...]] = ()
    """Photographs (JPEG, PNG, GIF or BMP) or recordings (WAV)."""
    picture: Path | None = None
    """File to draw them into, with their names."""


DEFAULT = Prediction()


class Named(NamedTuple):
    """A file as the network sees it, its names, and what they cost.

    seen: image uint8 [H, W, C], or frames of speech [T, F]. names: (class,
    probability), the most probable first. spikes, energy_nj: of this file.
    """

    file: str
    seen: np.ndarray
    names: list[tuple[str, float]]
    spikes: float
    energy_nj: float


def predict(trained: Trained, files: Sequence[str]) -> list[Named]:
    """Return the names of files.

    Raises:
        ValueError: there is none, or one is missing or of another kind.
    """
    model, card = trained
    if not files:
        raise ValueError("files: expected photographs or recordings, got none.")
    shown = [card.read([file]) for file in files]
    rows = []
    for file, raw in zip(files, shown, strict=True):
        xs = card.encode(jnp.asarray(raw))
        (chances,) = np.asarray(jax.nn.softmax(card.readout(model(xs), None)))
        names = [
            (card.class_names[i], float(chances[i])) for i in np.argsort(-chances)[:TOP]
        ]
        spent = energy.measure(model, xs)
        rows.append(Named(file, raw[0], names, spent.spikes_per_image, spent.energy_nj))
    return rows


def draw(rows: Sequence[Named], path: Path) -> None:
    """Draw what the network was shown, with the names, and write the picture."""
    from spikejax.plot import Picture

    figure = Picture(figsize=(2.6 * len(rows), 3.5), layout="constrained")
    panels: Any = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        if row.seen.ndim == 2:
            axes.imshow(row.seen.T, origin="lower", aspect="auto")
            axes.set(xlabel="time step", ylabel="mel band")
        else:
            is_grey = row.seen.shape[-1] == 1
            axes.imshow(row.seen.squeeze(), cmap="gray" if is_grey else None)
            axes.axis("off")
        lines = [f"{name} {chance:.0%}" for name, chance in row.names]
        axes.set_title("\n".join(lines), fontsize=10)
    figure.savefig(path, dpi=120)


def main(flags: Prediction) -> None:
    """Name the files of the command line."""
    rows = predict(load_named(flags.network), flags.files)
    for row in rows:
        names = ", ".join(f"{name} {chance:.1%}" for name, chance in row.names)
        cost = f"{row.spikes:,.0f} spikes, {row.energy_nj:,.0f} nJ"
        print(f"{row.file}: {names} ({cost})")
    if flags.picture:
        draw(rows, flags.picture)
        print(f"Written: {flags.picture}")


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
