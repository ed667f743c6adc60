from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from spikejax.experiment import Experiment
from spikejax.train import TrainConfig
from spikejax.train.settings import check_settings

Colour = Literal["red", "green"]


@dataclass(frozen=True)
class Settings:
    count: int = 1
    rate: float = 1.0
    flag: bool = False
    colour: Colour | Literal["all"] = "red"
    where: Path | None = None
    recipe: TrainConfig = TrainConfig()


@pytest.mark.parametrize(
    "good",
    [{}, {"rate": 2}, {"colour": "all"}, {"where": Path("x")}, {"flag": True}],
    ids=str,
)
def test_values_that_fit(good):
    check_settings(Settings(**good))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": "3"}, "count: expected an integer, got '3'."),
        ({"count": 1.5}, "count: expected an integer, got 1.5."),
        ({"count": True}, "count: expected an integer, got True."),
        ({"rate": "1"}, "rate: expected a number, got '1'."),
        (
            {"colour": "blue"},
            "colour: expected one of red, green or one of all, got 'blue'.",
        ),
        ({"where": "x"}, "where: expected a path or None, got 'x'."),
        ({"recipe": None}, "recipe: expected TrainConfig, got None."),
    ],
    ids=str,
)
def test_values_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError) as error:
        check_settings(Settings(**wrong))
    assert str(error.value) == message


def test_experiments_and_recipes_check_their_own():
    with pytest.raises(ValueError, match="optimizer: expected one of sgd, adamw, got"):
        TrainConfig(optimizer="adam")  # type: ignore
    with pytest.raises(ValueError, match="loss: expected one of rate, tet, got 'tett'"):
        Experiment(Path("x"), loss="tett")  # type: ignore
    made = Experiment("x", data_dir="y")  # type: ignore
    assert (made.workdir, made.data_dir) == (Path("x"), Path("y"))
