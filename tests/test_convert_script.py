"""The script of the Noise Adaptor, from flags to summary.json, in a few steps."""

import dataclasses
import json

import pytest

from experiments import convert as script
from spikejax.step import TrainConfig

TRAIN = TrainConfig(steps=2, batch_size=16)


def test_the_script_leaves_a_summary_and_a_picture(tmp_path, capsys):
    flags = dataclasses.replace(
        script.DEFAULT, workdir=tmp_path, bits=3, max_steps=3, train=TRAIN
    )
    script.main(flags)
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert row["name"] == "3 bits, noise 1" and row["bits"] == 3
    assert len(row["accuracy"]) == len(row["spikes_per_image"]) == 3
    assert min(row["accuracy"]) >= 0 and max(row["accuracy"]) <= 1
    assert len(row["v_thresholds"]) == 3
    assert (tmp_path / "convert.png").stat().st_size > 1000
    assert "T=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 9}, "expected 1 to 8 bits, got 9"),
        ({"noise": -1.0}, "expected noise of 0 or more, got -1.0"),
        ({"max_steps": 0}, "max_steps: expected at least 1, got 0"),
    ],
)
def test_bad_flags(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(script.DEFAULT, **options)
