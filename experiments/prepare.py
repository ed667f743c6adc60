"""Prepare a TFDS image set for training: download it and write array_record.

    python -m experiments.prepare cifar10 [--data-dir DIR]

imagenet2012 is made from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in
DIR/downloads/manual, which have to be fetched by hand.

Only this step needs TensorFlow: pip install -e '.[prepare]' in a clone.
"""

import dataclasses
import importlib.util
from pathlib import Path

from spikejax.experiment.cli import Positional, parse, run_cli


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A set of TFDS."""

    name: Positional[str] = ""
    """Name of a TFDS set, such as mnist."""
    data_dir: Path | None = None
    """Folder of TFDS sets; TFDS's own folder by default."""


DEFAULT = Preparation()


def prepare(name: str, data_dir: Path | None = None) -> str:
    """Download and prepare a set, unless it is prepared; return its folder.

    Raises:
        ValueError: no TFDS set, no TensorFlow, or archives to fetch by hand.
    """
    from spikejax.data.tfds import OWN, check_name

    if name in OWN:
        raise ValueError(
            f"prepare {name}: expected a TFDS set, got one that needs no preparing. "
            f"Train: --data {name}, with --data-dir FOLDER if it has files."
        )
    check_name(name)
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"prepare {name}: expected TensorFlow, which preparing needs (training "
            "does not), got none. In a clone: pip install -e '.[prepare]'"
        )
    import tensorflow_datasets as tfds

    print(f"Preparing {name}. Without a network TFDS tries for some minutes.")
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except AssertionError as error:  # TFDS's way to ask for archives fetched by hand
        raise ValueError(f"prepare {name}: {' '.join(str(error).split())}") from error
    return str(builder.data_dir)


def main(flags: Preparation) -> None:
    """Prepare the set, and print its folder."""
    name = flags.name
    try:
        print(f"{name} is prepared in {prepare(name, flags.data_dir)}")
    except OSError as error:  # no network, disk full
        raise ValueError(
            f"prepare {name}: {error}. Without a network, copy the folder of the set "
            "from a machine that has prepared it into --data-dir."
        ) from error


if __name__ == "__main__":
    run_cli(main, parse(DEFAULT, __doc__))
