"""What the fields of a dataclass of settings may hold: what their annotations say."""

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NAMES: dict[Any, str] = {
    **{int: "an integer", float: "a number", str: "text", Path: "a path"},
    type(None): "None",
}


def check_settings(settings: Any) -> None:
    """ValueError unless every field of a dataclass holds what its annotation says.

    Flags are checked when they are parsed; this is for settings made in Python, where a
    misspelt choice would otherwise train something else.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, hint):
            raise ValueError(f"{name}: expected {_described(hint)}, got {value!r}.")


def _fits(value, hint) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else origin or hint)


def _described(hint) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_described(kind) for kind in get_args(hint))
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))
