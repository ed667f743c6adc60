"""Prepare a TFDS image set for training: download it and write array_record.

    python -m experiments.prepare cifar10 [--data-dir DIR]

imagenet2012 is made from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in
DIR/downloads/manual, which have to be fetched by hand.

Only this step needs TensorFlow: pip install 'spikejax[prepare]'.
"""

import importlib.util
import sys
from typing import Annotated

import tyro


def prepare(name: str, data_dir: str | None = None) -> str:
    """Download and prepare a set, unless it is prepared; return its folder.

    Raises:
        ValueError: no TFDS set, no TensorFlow, or archives to fetch by hand.
    """
    from spikejax.data.files import TINY, TINY_ADDRESS
    from spikejax.data.tfds import check_name

    if name in ("tiny_imagenet", "folder"):
        files = f"{TINY} ({TINY_ADDRESS})" if name == "tiny_imagenet" else "its images"
        raise ValueError(
            f"prepare {name}: expected a TFDS set, got one that is read from {files} "
            f"directly. Train without preparing: --data {name} --data-dir FOLDER"
        )
    check_name(name)
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"prepare {name}: expected TensorFlow, which preparing needs (training "
            "does not), got none. Run: pip install 'spikejax[prepare]'"
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except AssertionError as error:  # TFDS's way to ask for archives fetched by hand
        raise ValueError(f"prepare {name}: {' '.join(str(error).split())}") from error
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
    """Prepare a TFDS image set for training."""
    try:
        print(f"{name} is prepared in {prepare(name, data_dir)}")
    except (ValueError, OSError) as error:  # OSError: no network, disk full
        sys.exit(f"{name}: {error}" if isinstance(error, OSError) else str(error))


if __name__ == "__main__":
    tyro.cli(main)
