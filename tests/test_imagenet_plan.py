"""What ``experiments.imagenet plan`` says, without the compiler."""

import sys

import pytest

from experiments import imagenet as script
from spikejax.experiment.cli import override
from spikejax.tpu.chips import GIB, find_slice
from spikejax.tpu.plan import Plan


def planned(temporaries, parameters=GIB):
    """A plan for v5e:2x4, of which a chip has 15.75 GiB."""
    return Plan(
        target=find_slice("v5e:2x4"),
        batch_size=512,
        train_images=1e6,
        parameters=parameters,
        optimizer=parameters,
        inputs=2 * parameters,
        outputs=0,
        temporaries=temporaries,
        program=0,
        flops=1e12,
        bytes_accessed=1e9,
        hbm_bytes=1e9,
        cycles=0,
        collectives=(),
        loops=0,
    )


@pytest.fixture
def asked(monkeypatch):
    """The changes for which a plan was made; LIF does not fit, remat mends it."""
    made = []

    def made_plan(flags, **changes):
        made.append(changes)
        fits = changes.get("neuron") != "lif" or changes.get("remat") == "blocks"
        return planned(GIB if fits else 20 * GIB)

    monkeypatch.setattr(script, "made_plan", made_plan)
    monkeypatch.setattr(script, "tpu_devices", lambda where: [])
    monkeypatch.setattr(script.jax.config, "update", lambda *_: None)
    return made


def test_one_network_is_compiled_unless_more_are_asked_for(asked, capsys):
    script.plan(script.Planned(topology="v5e:2x4"))
    said = capsys.readouterr().out
    assert asked == [{}]
    assert "mt-parallel, T=1: fits: 3.00 GiB of the 15.75 GiB of a v5e" in said


def test_a_recipe_can_be_planned(asked, capsys, monkeypatch):
    for recipe in ("mt-resnet34", "lif-resnet34"):
        monkeypatch.setattr(sys, "argv", ["imagenet", "plan", recipe])
        sys.argv += ["--topology", "v5e:2x4"]
        script.command()
        found = {"neuron": "mt-parallel", "time_steps": 1} | script.RECIPES[recipe]
        said = capsys.readouterr().out
        assert "{neuron}, T={time_steps}: fits".format(**found) in said
        assert "4096 images per step" in said


def test_networks_side_by_side_and_what_would_make_one_fit(asked, capsys):
    script.plan(script.Planned(topology="v5e:2x4", compare=True))
    said = capsys.readouterr().out
    lif = {"neuron": "lif", "time_steps": 4}
    relu = {"neuron": "relu", "time_steps": 1, "loss": "rate"}  # tet is of several
    assert asked[:3] == [{}, relu, lif]
    assert asked[3] == lif | {"remat": "blocks"}
    assert [row.split() for row in said.splitlines() if "fits  " in row]
    lines = said.splitlines()
    start = lines.index("lif, T=4: does not fit: 22.00 GiB of the 15.75 GiB of a v5e")
    assert lines[start + 1] == (
        "  with --remat blocks it fits: 3.00 GiB of the 15.75 GiB of a v5e"
    )
    assert lines[start + 2].startswith("  with --batch-size 328 it does not fit")
    assert len(lines) == start + 3  # sharding the parameters spares too little


def test_sharding_is_tried_where_it_may_be_enough(asked):
    remat = override(script.Planned(topology="v5e:2x4"), {"remat": "blocks"})
    wide = planned(GIB, parameters=10 * GIB)  # 17.5 of 21 GiB may be spared
    assert list(script.attempts(remat, wide, {})) == ["--fsdp 8"]
    assert list(script.attempts(override(remat, {"fsdp": 8}), wide, {})) == []


@pytest.mark.parametrize(
    ("flags", "count"),
    [({"epochs": 2.0}, 2 * 1_281_167), ({"steps": 10, "batch_size": 64}, 640)],
)
def test_hours_are_of_the_epochs_or_of_the_steps(flags, count, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        script, "plan_training", lambda *_, **given: asked.update(given)
    )
    script.made_plan(override(script.Planned(topology="v5e:2x2"), flags))
    assert asked["train_images"] == count


def test_wrong_commands_are_one_line(monkeypatch, capsys):
    with pytest.raises(
        ValueError, match="expected a slice that v5e has, got 'v5e:3x3'"
    ):
        script.plan(script.Planned(topology="v5e:3x3"))
    for words in (["resnet"], ["plan", "resnet"]):
        monkeypatch.setattr(sys, "argv", ["imagenet", *words])
        with pytest.raises(SystemExit) as exit:
            script.command()
        assert exit.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith("recipe: expected plan or one of mt-resnet34, ")
        assert said.endswith("got 'resnet'.\n")
