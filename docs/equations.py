"""Docstrings as the site shows them: equations keep their lines.

A docstring is plain text, and Markdown would join its lines. Loaded by mkdocs.yml.
"""

import re

import griffe

EQUATION = re.compile(r"^\S[^.:]* = |^(training|evaluation|soft|decay_input)\b.*: ")
OTHER = re.compile(r"^ +(Other arguments are those of .*)$", re.MULTILINE)


def marked_up(text: str) -> str:
    """Paragraphs of equations indented, and no sentence among the arguments."""
    first, *paragraphs = text.split("\n\n")
    shown = [
        re.sub("^", "    ", p, flags=re.MULTILINE)
        if EQUATION.match(p) and not p.rstrip().endswith(".")
        else p
        for p in paragraphs
    ]
    return OTHER.sub(r"\n\1", "\n\n".join([first, *shown]))


class Equations(griffe.Extension):
    """Runs over every object that has a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Marks up its docstring."""
        if obj.docstring:
            obj.docstring.value = marked_up(obj.docstring.value)
