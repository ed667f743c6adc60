"""The command line: flags over a dataclass, and one line where they are wrong."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import tyro

T = TypeVar("T")


def parse(default: T, description: str | None) -> T:
    """Flags of the command line over ``default``, a dataclass of typed fields.

    Leaves with exit code 1 and one line on stderr where a flag or its value is wrong.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            flags, unknown = tyro.cli(
                type(default),
                default=default,
                description=description,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as exit:
        if not exit.code:  # --help
            raise
        lines = [line.strip(" │") for line in said.getvalue().splitlines()]
        ruled = re.compile("[╭╮╰╯─-]*").fullmatch  # tyro's frame; the first is a title
        lines = itertools.dropwhile(ruled, lines[1:])
        text = " ".join(itertools.takewhile(lambda x: not ruled(x), lines))
        fail("flags: " + re.sub(r"^Error parsing [^:]+: (?=\w+: )", "", text))
    if unknown:
        known = [f"--{f.name.replace('_', '-')}" for f in _fields(default)]
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"Did you mean {near[0]}?" if near else "--help lists them."
        fail(f"flags: expected those of this script, got {unknown[0]}. {hint}")
    return flags


def _fields(config):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from dataclasses.fields(value)
        else:
            yield field


def fail(message: str) -> NoReturn:
    """One line on stderr, and exit code 1."""
    print(" ".join(str(message).split()), file=sys.stderr)
    sys.exit(1)


def reported(script: Callable[[T], None], flags: T) -> None:
    """Run a script; what the user got wrong is one line and exit code 1.

    SIGTERM leaves with exit code 0; ``fit`` saves first.
    """
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        script(flags)
    except (ValueError, OSError) as error:  # OSError: a folder that cannot be written
        fail(str(error))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave(*_: object) -> NoReturn:
    print("Stopped. The same command goes on from the last checkpoint.")
    sys.exit(0)
