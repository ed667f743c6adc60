"""Writes flags.md: every flag of every experiment, from the sources.

python docs/flags.py
"""

import ast
import dataclasses
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from spikejax.experiment import Experiment

SCRIPTS = (
    *("digits", "cifar10", "cifar100", "imagenet", "tinyimagenet"),
    *("general", "convert", "dvs_cifar10"),
)
HEAD = """# Flags

Every script of `experiments/` trains, and takes the flags of the first table;
`python -m experiments.NAME --help` shows them with the script's defaults. A switch
takes no value; `--no-profile` turns it off. [design.md](design.md#contract-of-a-run)
says what a run leaves in its folder. This page is written by `docs/flags.py`.
"""


class Flag(NamedTuple):
    """One flag: its name, what it takes, its default, and what it does."""

    name: str
    values: str
    default: Any
    what: str

    def row(self) -> str:
        """Its line of a table."""
        return (
            f"| `{self.name}` | {self.values} | {shown(self.default)} | {self.what} |"
        )


def shown(value: Any) -> str:
    """A default as it is typed; a flag that is not given has none."""
    if value is None or value is False:
        return ""
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value}`"


def docstrings(cls: type) -> dict[str, str]:
    """{field of a dataclass: the string under it}, with those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                name, value = ast.unparse(field.target), ast.literal_eval(text.value)
                found[name] = " ".join(value.split())
    return found


def values(hint: Any) -> str:
    """What a flag of this type takes."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not type(None)]
    names = {int: "integer", float: "number", str: "text", Path: "path", bool: "switch"}
    return " or ".join(names.get(kind) or values(kind) for kind in kinds)


def flags(config: Any) -> dict[str, Flag]:
    """{name: flag} of a dataclass with defaults; those inside of it are joined."""
    found: dict[str, Flag] = {}
    hints, texts = get_type_hints(type(config)), docstrings(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= flags(value)
            continue
        name = f"--{field.name.replace('_', '-')}"
        found[name] = Flag(name, values(hints[field.name]), value, texts[field.name])
    return found


def scripts() -> dict[str, dict[str, Flag]]:
    """{script: its flags}."""
    modules = {name: importlib.import_module(f"experiments.{name}") for name in SCRIPTS}
    defaults = {name: module.DEFAULT for name, module in modules.items()}
    defaults["imagenet plan"] = modules["imagenet"].Planned()
    return {name: flags(defaults[name]) for name in sorted(defaults)}


def page() -> str:
    """The page."""
    head = "| flag | takes | default | |\n| --- | --- | --- | --- |"
    shared = flags(Experiment(workdir=Path("DIR")))
    lines = [HEAD, head, *(flag.row() for flag in shared.values())]
    for name, own in scripts().items():
        lines += ["", f"## `experiments.{name}`", ""]
        script, _, verb = name.partition(" ")
        if not verb:
            doc = importlib.import_module(f"experiments.{script}").__doc__
            lines += [str(doc).partition("\n")[0], ""]
        new = [
            flag
            for flag in own.values()
            if flag.name not in shared or flag.what != shared[flag.name].what
        ]
        other = [
            f"`{flag.name}` {shown(flag.default)}"
            for flag in own.values()
            if flag not in new and flag.default != shared[flag.name].default
        ]
        lines.append("Defaults of its own: " + ", ".join(other) + ".")
        if new:
            lines += ["", head, *(flag.row() for flag in new)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(page(), "utf-8")
