"""The command line: flags over a dataclass, one line for an error, and the cache."""

import argparse
import ast
import contextlib
import copy
import dataclasses
import difflib
import errno
import inspect
import logging
import os
import platform
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NoReturn,
    TextIO,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import jax

from spikejax.nn import cpu

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Words = TypeVar("Words")
Positional = Annotated[Words, "a word of the command, without a flag"]
KINDS = {int: "an integer", float: "a number", Path: "a path", str: "text"}
is_group: Callable[[Any], bool] = dataclasses.is_dataclass


def take_recipe(
    recipes: Mapping[str, dict[str, Any]], *commands: str
) -> tuple[str, dict[str, Any]]:
    """Take [COMMAND] [RECIPE], the words before the first flag, off the command line.

    Returns:
        the command, or "" without one, and the flags of the recipe, by default of the
        first one.

    Exits with code 1 and one line on stderr if there is no such recipe.
    """
    words = []
    while len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        words.append(sys.argv.pop(1))
    command = words.pop(0) if words and words[0] in commands else ""
    name = " ".join(words) or next(iter(recipes))
    if name not in recipes:
        known = " or ".join([*commands, f"one of {', '.join(recipes)}"])
        text = f"recipe: expected {known}, got {name!r}."
        fail(f"{text} {_nearest(name, recipes)}".strip())
    return command, recipes[name]


def parse(default: T, description: str | None, *options: Any, usage: str = "") -> T:
    """Return ``default``, a dataclass of typed fields, with the flags of the command.

    Fields of dataclasses inside it are flags too. A field whose type is a union of
    dataclasses holds one of several groups of options; the value of the group's first
    flag, such as --model, selects the group, and only its flags exist.

    Exits with code 1 and one line on stderr if a flag or its value is wrong.

    Args:
        default: values of the flags that are not given.
        description: text of --help.
        options: groups to start from, other than their class's defaults, where the
            command line selects another group than that of ``default``.
        usage: words before the flags that the script reads itself, and a space.
    """
    words = sys.argv[1:]
    if empty := [word for word in words if not word.strip() or word.endswith("=")]:
        fail(f"flags: expected a value after each flag, got {empty[0]!r}.")
    names = [word.split("=")[0] for word in words if word.startswith("--")]
    if twice := [name for name in names if names.count(name) > 1]:
        fail(f"flags: expected each flag once, got {twice[0]} twice. Take one of them.")
    # Two passes: which flags there are depends on the groups that others select.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, _ in _groups(default):
        first.add_argument(flag_name(name), nargs="?")
    chosen = {k: v for k, v in vars(first.parse_known_args()[0]).items() if v}
    script = ".".join(Path(sys.argv[0]).with_suffix("").parts[-2:])
    parser = argparse.ArgumentParser(
        usage=f"python -m {script} {usage}[-h] [FLAGS]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    try:
        default = override(default, chosen, *options)
        hints = _add_flags(parser, parser.add_argument, default)
        valued = {flag_name(k): k for k, hint in hints.items() if hint is not bool}
        for flag, after in pairwise([*words, "--"]):
            if flag in valued and after.startswith("--"):
                _value(valued[flag], hints[valued[flag]], "")  # raises
        given, unknown = parser.parse_known_intermixed_args()
        flags = {k: _value(k, hints[k], v) for k, v in vars(given).items()}
        if unknown:
            fail(f"flags: {_explain(default, unknown[0])}")
        return checked(override(default, flags))
    except argparse.ArgumentError as error:  # a switch with a value
        fail(f"flags: {error}.")
    except ValueError as error:
        fail(str(error))


def _add_flags(
    parser: argparse.ArgumentParser,
    add: Callable[..., Any],
    config: "DataclassInstance",
    kinds: tuple[type, ...] = (),
) -> dict[str, Any]:
    """Add the flags of a dataclass, which may be one of several kinds, to a parser.

    Args:
        parser: gets a group of flags for each dataclass inside this one.
        add: adds a flag to the group of this one.
        config: the dataclass.
        kinds: those that may be in its place.

    Returns:
        {field: type}.
    """
    kind, found = type(config), {}
    hints, texts = get_type_hints(kind, include_extras=True), dict(field_texts(kind))
    if kinds:  # the help of the flag that selects one names all
        name, kind_of = alternatives(kinds)
        hints[name] = Literal[tuple(kind_of)]
        others = [field_texts(k)[name] for k in kinds if k is not kind]
        help_of = f"{flag_name(name)} VALUE --help has the flags of each."
        texts[name] = " ".join([texts[name], *others, help_of])
    for name, hint in hints.items():
        value, flag, text = getattr(config, name), flag_name(name), texts[name]
        if is_group(value):
            group = parser.add_argument_group(f"{name} options", type(value).__doc__)
            found |= _add_flags(parser, group.add_argument, value, get_args(hint))
            continue
        options: Any = {"dest": name, "metavar": "VALUE"}
        if get_origin(hint) is Annotated:  # a word without a flag
            hint, flag, options = get_args(hint)[0], name, {"nargs": "?"}
            parser.usage = f"{parser.usage} {name.upper()}"
        if get_origin(hint) is tuple:
            options["nargs"] = "*"
        if hint is bool:
            options = {"dest": name, "action": argparse.BooleanOptionalAction}
        if get_origin(hint) is Literal:
            text += f" One of {', '.join(get_args(hint))}."
        if value not in (None, "", ()):
            text += f" (default: {value})"
        add(flag, help=text.replace("%", "%%"), **options)
        found[name] = hint
    return found


def _value(name: str, hint: object, value: Any) -> Any:
    """Return the value of a field from what argparse found: a word, "" for none.

    Raises:
        ValueError: it is of another type, or none.
    """
    # The choices of a Literal, or X of X | None.
    kinds: tuple[Any, ...] = get_args(hint) or (hint,)
    if get_origin(hint) is tuple:
        return tuple(_value(name, kinds[0], word) for word in value)
    if hint is bool:
        return value
    if value == "None" and type(None) in kinds:
        return None
    expected, make = KINDS.get(kinds[0], ""), kinds[0]
    if get_origin(hint) is Literal:
        expected, make = f"one of {', '.join(kinds)}", {k: k for k in kinds}.__getitem__
    with contextlib.suppress(KeyError, ValueError):
        if value:
            return make(value)
    flag, got = flag_name(name), repr(value) if value else "none"
    raise ValueError(
        f"flags: expected {expected} after {flag}, got {got}. --help explains it."
    )


@cache
def field_texts(kind: type) -> dict[str, str]:
    """Return {field of a dataclass or its bases: the string under it}."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for field, text in pairwise(body.body):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    texts[name] = " ".join(words.split())
    return texts


def flag_name(field: str) -> str:
    """Return the flag of a field: --batch-size of batch_size, --from of from_."""
    return "--" + field.rstrip("_").replace("_", "-")


def flatten(config: "DataclassInstance") -> dict[str, Any]:
    """Return {field: value} of a dataclass and of the dataclasses inside it."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= flatten(value) if is_group(value) else {field.name: value}
    return flat


def alternatives(kinds: tuple[type, ...]) -> tuple[str, dict[str, type]]:
    """Return the first flag of groups of options, and {its values: their group}."""
    name = dataclasses.fields(kinds[0])[0].name
    pairs = ((kind, get_args(get_type_hints(kind)[name])) for kind in kinds)
    return name, {value: kind for kind, values in pairs for value in values}


def override(config: T, flags: dict[str, Any], *options: Any) -> T:
    """Return a dataclass with other values of flags, and the groups that they select.

    A group that is selected is the one among ``options`` or new, and keeps the values
    of flags that it has in common with the group in whose place it comes.

    Its checks are not run, as a value may need flags that are read later: `checked`
    runs them.

    Raises:
        ValueError: no group has that value of its first flag.
    """
    made, hints = copy.copy(config), get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not is_group(value):
            value = flags.get(field.name, value)
        else:
            if kinds := get_args(hints[field.name]):
                name, kind_of = alternatives(kinds)
                if (choice := flags.get(name, getattr(value, name))) not in kind_of:
                    known = ", ".join(kind_of)
                    if len(kind_of) > 10:  # networks: more than a line is read for
                        known = "with a name that --help lists"
                    text = f"flags: expected {flag_name(name)} {known}, got {choice!r}."
                    raise ValueError(f"{text} {_nearest(str(choice), kind_of)}".strip())
                value = _select(kind_of[choice], value, *options)
            value = override(value, flags, *options)
        vars(made)[field.name] = value
    return made


def _select(kind: type, before: "DataclassInstance", *options: Any) -> Any:
    """Return the group of a kind: ``before``, one of the options, or a new one."""
    found = [group for group in (before, *options) if type(group) is kind]
    if found:
        return found[0]
    made, values = kind(), vars(before)
    vars(made).update({name: v for name, v in values.items() if name in vars(made)})
    return made


def checked(config: T) -> T:
    """Return a dataclass, after its checks and those of the dataclasses inside it."""
    values = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config)
    }
    groups = {k: checked(v) for k, v in values.items() if is_group(v)}
    return dataclasses.replace(config, **groups)


def _groups(config: "DataclassInstance") -> Iterator[tuple[str, dict[str, type]]]:
    """Yield the ``alternatives`` of each field that may hold several."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if is_group(value):
            if kinds := get_args(hints[field.name]):
                yield alternatives(kinds)
            yield from _groups(value)


def _explain(config: "DataclassInstance", unknown: str) -> str:
    """Return the reason why a flag is not one of the config."""
    flag, flags = unknown.split("=")[0], flatten(config)
    for name, kind_of in _groups(config):
        owners = [v for v in kind_of if flag in map(flag_name, flatten(kind_of[v]()))]
        if owners:
            own = [flag_name(n) for n in flatten(kind_of[flags[name]]()) if n != name]
            takes = ", ".join(own) or "none of its own"
            which = f"{flag_name(name)} {flags[name]}"
            return (
                f"expected a flag of {which} ({takes}), got {flag}, which is one of "
                f"{flag_name(name)} {owners[0]}."
            )
    if not flag.startswith("-"):
        return f"expected --NAME before each value, got {unknown}. --help lists them."
    # Flags of other groups too: their own line then says which value selects them.
    kinds = [kind for _, kind_of in _groups(config) for kind in kind_of.values()]
    known = dict.fromkeys(
        map(flag_name, [*flags, *(n for k in kinds for n in flatten(k()))])
    )
    hint = _nearest(flag, known) or "--help lists them."
    return f"expected those of this script, got {unknown}. {hint}"


def _nearest(word: str, known: Collection[str]) -> str:
    """Return a question for the known word that is close to this one, if one is."""
    near = [k for k in known if k.startswith(word)]
    near = near or difflib.get_close_matches(word, known, 1, 0.75)
    return f"Did you mean {near[0]}?" if near else ""


def fail(message: str) -> NoReturn:
    """Print one line on stderr, and exit with code 1."""
    print(" ".join(str(message).split()), file=sys.stderr)
    sys.exit(1)


def run_cli(script: Callable[[T], None], flags: T) -> None:
    """Run a script; an error of the user's is one line on stderr and exit code 1.

    SIGTERM and SIGHUP exit with code 0, Ctrl-C with 130; ``fit`` saves first.
    """
    # Before JAX starts its threads, each of which would have memory of its own.
    cpu.keep_memory()
    # Orbax logs pages of tracebacks from its threads for an error that it raises too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # ``fit`` has handlers of its own; these are for the time before and after.
    caught = signal.SIGTERM, signal.SIGHUP
    previous = {n: signal.getsignal(n) for n in caught}
    for number in caught:
        if previous[number] is not signal.SIG_IGN:  # as it is under nohup
            signal.signal(number, lambda *_: _leave(0))
    try:
        with contextlib.redirect_stdout(_Output(sys.stdout)):
            script(flags)
    except KeyboardInterrupt:
        _leave(130)
    except ValueError as error:
        fail(str(error))
    except OSError as error:  # a folder that cannot be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        fail(
            f"{where}{error.strerror or error}. Check the path, its permissions, and "
            "the space on its disk."
        )
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Output:
    """Standard output that may be closed, as by ``| head``: the run continues."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            self._stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: no more terminal
                raise
            # What is left in the buffer goes there too, else Python fails at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _leave(code: int) -> NoReturn:
    print("Stopped. Rerun the same command to resume from the last checkpoint.")
    sys.exit(code)


def cache_folder() -> Path:
    """Return spikejax in $XDG_CACHE_HOME (~/.cache); it is safe to delete."""
    parent = os.environ.get("XDG_CACHE_HOME")
    return (Path(parent) if parent else Path.home() / ".cache") / "spikejax"


def cache_programs() -> Path | None:
    """Cache what takes more than a second to compile; return the folder if it is new.

    JAX_COMPILATION_CACHE_DIR selects another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false none.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    # Compiled CPU programs are not portable, and $HOME may be shared between machines.
    folder = cache_folder() / f"programs-{platform.node()}"
    config.update("jax_compilation_cache_dir", str(folder))
    return folder
