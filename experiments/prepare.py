"""Prepares a TFDS image set to be trained on: downloads it and writes array_record.

    python -m experiments.prepare cifar10 [--data-dir DIR]

This step alone needs TensorFlow: pip install 'spikejax[prepare]'.
"""

import importlib.util
import sys
from typing import Annotated

import tyro


def prepare(name: str, data_dir: str | None = None) -> str:
    """Downloads and prepares a set, unless that is done; returns its folder."""
    from spikejax.data.sources import check_name

    check_name(name)
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"prepare {name}: expected TensorFlow, which preparing needs (training "
            "does not), got none. Run: pip install 'spikejax[prepare]'"
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def main(
    name: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="NAME", help="Name of a TFDS set, such as mnist."),
    ],
    data_dir: Annotated[
        str | None, tyro.conf.arg(help="TFDS's folder; without it, TFDS's default.")
    ] = None,
) -> None:
    """Prepares a TFDS image set to be trained on."""
    try:
        print(f"{name} is prepared in {prepare(name, data_dir)}")
    except (ValueError, OSError) as error:  # OSError: no network, disk full
        sys.exit(f"{name}: {error}" if isinstance(error, OSError) else str(error))


if __name__ == "__main__":
    tyro.cli(main)
