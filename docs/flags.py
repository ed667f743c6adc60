"""Write flags.md: every flag of every experiment, from the sources.

python docs/flags.py
"""

import dataclasses
import importlib
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    get_args,
    get_origin,
    get_type_hints,
)

from spikejax.experiment import Experiment, Images
from spikejax.experiment.build import ActivationOptions, NetworkOptions
from spikejax.experiment.cli import alternatives, field_texts, flag_name

SCRIPTS = (
    *("digits", "cifar10", "cifar100", "imagenet", "tinyimagenet", "general"),
    *("convert", "convert_imagenet", "hybrid", "dvs_cifar10", "speech", "evaluate"),
    *("predict", "release", "selfcheck"),
)
OPTIONS = get_args(NetworkOptions) + get_args(ActivationOptions)
HEAD = """# Flags

`python -m experiments.NAME --help` shows the flags of a script with its defaults. A
switch takes no value; `--no-profile` turns it off. A flag that would do nothing, such
as `--pool` with a resnet, is an error. [design.md](design.md#contract-of-a-run)
describes the files of a run. This page is written by `docs/flags.py`.

## Of every script
"""
TABLE = "| flag | takes | default | |\n| --- | --- | --- | --- |"


class Flag(NamedTuple):
    """One flag: its name, its values, its default, and its description."""

    name: str
    values: str
    default: Any
    what: str

    def row(self) -> str:
        """Return its line of a table."""
        return (
            f"| `{self.name}` | {self.values} | {shown(self.default)} | {self.what} |"
        )


def shown(value: Any) -> str:
    """Return a default as it is typed; a flag that is not given has none."""
    if value is None or value is False:
        return ""
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value}`"


def values(hint: Any) -> str:
    """Return the values that a flag of this type takes."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not type(None)]
    names = {int: "integer", float: "number", str: "text", Path: "path", bool: "switch"}
    return " or ".join(names.get(kind) or values(kind) for kind in kinds)


def flags(config: Any, options: bool = True) -> dict[str, Flag]:
    """Return {name: flag} of a dataclass with defaults and of those inside it."""
    found: dict[str, Flag] = {}
    hints = get_type_hints(type(config), include_extras=True)
    texts = field_texts(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            if options or type(value) not in OPTIONS:
                found |= flags(value, options)
            continue
        hint = hints[field.name]
        if get_origin(hint) is Annotated:  # a word without a flag
            continue
        name = flag_name(field.name)
        found[name] = Flag(name, values(hint), value, texts[field.name])
    return found


@cache
def scripts() -> dict[str, dict[str, Flag]]:
    """Return {script: its flags}, with those of all networks and neurons."""
    modules = {name: importlib.import_module(f"experiments.{name}") for name in SCRIPTS}
    defaults = {name: module.DEFAULT for name, module in modules.items()}
    defaults["imagenet plan"] = modules["imagenet"].Planned()
    every: dict[str, Flag] = {}
    for kinds in (get_args(NetworkOptions), get_args(ActivationOptions)):
        selector, kind_of = alternatives(kinds)
        for kind in kinds:
            every |= flags(kind())
        takes = ", ".join(f"`{value}`" for value in kind_of)
        every[flag_name(selector)] = every[flag_name(selector)]._replace(values=takes)
    found = {}
    for name in sorted(defaults):
        own = {
            flag: kept._replace(values=every[flag].values) if flag in every else kept
            for flag, kept in flags(defaults[name]).items()
        }
        found[name] = every | own
    return found


def page() -> str:
    """Return the page."""
    shared = flags(Experiment(workdir=Path("DIR")), options=False)
    images = {name: shared.pop(name) for name in flags(Images())}
    chosen = {name: flag for kind in OPTIONS for name, flag in flags(kind()).items()}
    lines = [HEAD, TABLE, *(flag.row() for flag in shared.values())]
    lines += ["", "## Of scripts on images", "", TABLE]
    lines += [flag.row() for flag in images.values()]
    lines += ["", "## Of networks and neurons", ""]
    for kind in OPTIONS:
        rows = [flag.row() for flag in flags(kind()).values()]
        lines += [str(kind.__doc__).rstrip(".") + ":", "", TABLE, *rows, ""]
    known = shared | images
    for name in sorted([*SCRIPTS, "imagenet plan"]):
        script, _, verb = name.partition(" ")
        module = importlib.import_module(f"experiments.{script}")
        own = flags(module.Planned() if verb else module.DEFAULT)
        lines += [f"## `experiments.{name}`", ""]
        lines += [] if verb else [str(module.__doc__).partition("\n")[0], ""]
        new = {
            name: flag
            for name, flag in own.items()
            if name not in chosen
            and (name not in known or flag.what != known[name].what)
        }
        other = [
            f"`{name}` {shown(flag.default)}"
            for name, flag in own.items()
            if name in ("--model", "--neuron")
            or (name not in new and flag.default != (known | chosen)[name].default)
        ]
        lines += ["Defaults of its own: " + ", ".join(other) + ".", ""] if other else []
        if new:
            lines += [TABLE, *(flag.row() for flag in new.values()), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(page(), "utf-8")
