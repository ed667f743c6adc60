"""The words of docstrings, comments and errors, as far as a test can judge them."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A function's docstring starts with a verb ("Return the ..."), a class's with a noun.
NEVER_FIRST = (
    "what|where|whether|of|how|as|when|who|why|which|if|in|on|for|from|to|with|by|at|it"
    "|its|is|are|no|not|each|every|all|any|both|one|two|this|that|these|those|they"
)
NO_VERB = re.compile(rf"\W*({NEVER_FIRST}|the|a|an)\b", re.IGNORECASE)
NO_NOUN = re.compile(
    rf"\W*({NEVER_FIRST}|returns?|yields?|holds?|keeps?|makes?|gives?|do|does|runs?|takes?"
    "|tells?|has|have)\\b",
    re.IGNORECASE,
)

# Words that are no terms of the field, or that another language uses for one.
BANNED = {
    r"\brooms?\b|\bhouses?\b|\bdoors?\b|\bside rooms?\b": "module, package, entry",
    r"\bfloors\b|\b(?:ground|upper) floor\b": "layer",  # floor(x) is a function
    r"\blies\b|\blying\b": "is, is placed, is sharded",
    r"\bhangs?\b(?! (?:until|forever|for ever))": "is attached",  # a process may hang
    r"\bstands?\b(?! (?:for|alone)\b)": "is, is written",
    r"\b(?:go|goes|went|going) on\b": "continue, resume",
    r"\btold\b": "given, passed, reported",
    r"\banew\b": "again",
    r"\bg(?:ive|ives|ave) way\b": "is replaced",
    r"\bwithout a word\b": "silently",
    r"\bat once\b": "immediately, together",
    r"\bstays? as (?:it is|they are)\b": "is not modified",
    r"\b[Mm]end(?:s|ed)?\b": "fix",
}

# Names of parameters that may be Any: pytrees, JSON, operands that an interpreter
# traces, and arguments that are checked.
ANY = {"params", "state", "tree", "leaf", "value", "content", "settings", "train_data"}
ANY |= {"batch", "source", "neuron", "dtype", "a", "b"}


def short_name(path: Path) -> str:
    """spikejax/tpu/plan.py -> tpu.plan, experiments/digits.py -> experiments.digits."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "spikejax" else parts
    return ".".join(part for part in parts if part != "__init__") or "spikejax"


FILES = {
    short_name(path): path
    for package in ("spikejax", "experiments")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TEXTS = {name: path.read_text("utf-8") for name, path in FILES.items()}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(
    node: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Yields (path, node) of the functions and classes, those inside others too."""
    for child in ast.iter_child_nodes(node):
        path = prefix
        if isinstance(child, Function | ast.ClassDef):
            path = f"{prefix}.{child.name}".lstrip(".")
            yield path, child
        yield from definitions(child, path)


def own_raises(node: ast.AST) -> Iterator[ast.Raise]:
    """Yields the raises of a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            yield child
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield from own_raises(child)


def is_property(node: ast.AST) -> bool:
    names = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
    return any(name.endswith(("property", "setter")) for name in names)


def is_public(path: str) -> bool:
    return not any(part.startswith("_") for part in path.split("."))


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of the strings in raised errors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def prose(name: str) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of docstrings, strings under fields, comments and errors."""
    for token in tokenize.generate_tokens(io.StringIO(TEXTS[name]).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(TREES[name]):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text
    yield from messages(TREES[name])


def parameters(node: Function) -> list[ast.arg]:
    a = node.args
    found = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    return [arg for arg in found if arg.arg not in ("self", "cls")]


@pytest.mark.parametrize("name", FILES)
def test_functions_start_with_a_verb_and_classes_with_a_noun(name):
    wrong = []
    for path, node in definitions(TREES[name]):
        line = (ast.get_docstring(node) or "").split("\n")[0]
        # A property may be described as the attribute that it looks like.
        noun = isinstance(node, ast.ClassDef)
        refused = NO_NOUN if noun else NO_VERB
        if refused.match(line) and not (is_property(node) and line.startswith("The ")):
            wrong.append(f"{path}: {line}")
    assert not wrong, "\n".join([name, *wrong])


@pytest.mark.parametrize("name", FILES)
def test_words_are_the_fields(name):
    wrong = []
    for line, text in prose(name):
        for pattern, better in BANNED.items():
            for found in re.finditer(pattern, text):
                at = line + text[: found.start()].count("\n")
                wrong.append(f"{FILES[name]}:{at}: {found[0]!r}: {better}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", FILES)
def test_docstrings_say_what_is_raised(name):
    missing = []
    for path, node in definitions(TREES[name]):
        if not isinstance(node, Function) or not list(own_raises(node)):
            continue
        if name.startswith("experiments"):  # a script is not called
            continue
        owner = path.removesuffix(".__init__") if node.name == "__init__" else path
        if not is_public(owner):
            continue
        docs = dict(definitions(TREES[name]))
        # One line may say it too: "...; ValueError if a file is damaged."
        if not re.search(r"Raise|Error\b", ast.get_docstring(docs[owner]) or ""):
            missing.append(owner)
    assert not missing, f"{name}: no Raises: in the docstring of {', '.join(missing)}"


@pytest.mark.parametrize("name", FILES)
def test_parameters_have_a_type(name):
    missing, anything = [], []
    for path, node in definitions(TREES[name]):
        for arg in parameters(node) if isinstance(node, Function) else []:
            where = f"{name}.{path}.{arg.arg}"
            if arg.annotation is None:
                missing.append(where)
            elif ast.unparse(arg.annotation) == "Any" and arg.arg not in ANY:
                anything.append(where)
    assert not missing, f"no type: {', '.join(missing)}"
    assert not anything, f"Any: name the type of {', '.join(anything)}"
