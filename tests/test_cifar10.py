"""The recipes of the CIFAR-10 script."""

import sys

import pytest

import spikejax
from experiments import cifar10
from spikejax.experiment.cli import checked, flatten, override


@pytest.fixture
def ran(monkeypatch):
    """The experiments that the script would run, by its words and flags."""
    found = []
    monkeypatch.setattr(cifar10, "main", found.append)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["cifar10", *words])
        cifar10.command()
        return found.pop()

    return run


@pytest.mark.parametrize(
    ("recipe", "network"),
    [
        ("mt-whitened", "cifar10-mt4"),
        ("lif-whitened", "cifar10-lif"),
        ("relu-whitened", "cifar10-relu"),
    ],
)
def test_the_networks_of_the_package_are_those_of_the_recipes(ran, recipe, network):
    card = spikejax.pretrained(network).card
    flags = flatten(ran(recipe))
    # The networks were trained when relu had a surrogate, which did nothing.
    same = card.flags.keys() & flags.keys() - {"save_every", "evaluate_every"}
    assert {n: flags[n] for n in same} == {n: card.flags[n] for n in same}


@pytest.mark.parametrize("recipe", cifar10.RECIPES)
def test_a_recipe_is_a_set_of_flags_that_fit_together(recipe):
    changes = cifar10.RECIPES[recipe]
    flags = flatten(checked(override(cifar10.DEFAULT, changes)))
    assert {name: flags[name] for name in changes} == changes
    assert recipe in cifar10.__doc__


def test_flags_change_a_recipe_and_the_default_needs_no_name(ran):
    assert ran() == ran("mt-resnet20") == cifar10.DEFAULT
    changed = ran("mt-whitened", "--seed", "1", "--epochs=2")
    assert (changed.train.seed, changed.train.epochs) == (1, 2)
    assert changed.train.learning_rate == 0.7


@pytest.mark.parametrize("recipe", ["mt-whitened", "mt-transformer"])
def test_another_neuron_keeps_the_surrogate_of_a_recipe(ran, recipe):
    """So that networks that are compared differ in the neuron alone."""
    before = flatten(ran(recipe))
    for neuron in ("lif", "alif", "mt-cascade", "i-lif", "relu"):
        flags = flatten(ran(recipe, "--neuron", neuron)).items()
        assert {name for name, value in flags if value != before[name]} == {"neuron"}
        assert ("surrogate", "rectangle") in flags or neuron == "relu"


def test_an_unknown_recipe_is_one_line(ran, capsys):
    with pytest.raises(SystemExit, match="1"):
        ran("mt-whitend", "--seed", "1")
    said = capsys.readouterr().err
    assert said == (
        "recipe: expected one of mt-resnet20, mt-whitened, lif-whitened, "
        "relu-whitened, mt-transformer, mt-resnet19, general-cnn, got "
        "'mt-whitend'. Did you mean mt-whitened?\n"
    )
