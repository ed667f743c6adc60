"""The rules of the architecture, checked on the source: docs/design.md says why."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("spikejax", "experiments")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

NEURON = {"_compat", "surrogate", "neurons", "unroll", "memory", "layers"}
NEURON |= {"encode", "losses"}

# Storey (a file or a folder of spikejax) -> the storeys that it may import.
STOREYS = {
    "": NEURON | {"nn", "conversion", "functions"},
    **{name: NEURON for name in NEURON},
    "nn": NEURON | {"trace", "functions"},
    "trace": set(),
    "functions": {"trace"},
    "energy": NEURON | {"nn", "trace", "functions"},
    "models": NEURON | {"nn"},
    "data": set(),
    "train": NEURON | {"nn"},
    "conversion": NEURON | {"nn", "trace", "functions"},
    "nir": NEURON | {"nn", "trace"},
    "plot": NEURON | {"nn", "energy"},
    "tpu": {"train"},
    "experiment": NEURON
    | {"", "nn", "models", "data", "train", "conversion", "energy"},
}

# Packages that only extras install -> the modules that may import them.
OPTIONAL = {
    "PIL": {"data.augment", "data.split"},
    "array_record": {"data.tfds"},
    "grain": {"data.images"},
    "sklearn": {"data.tfds", "data.images"},
    "tensorflow_datasets": {"data.tfds", "data.images"},
    "matplotlib": {"plot"},
    "rich": {"train.progress"},
    "tensorboardX": {"train.progress"},
    "h5py": {"nir.read"},
    "hdf5plugin": set(),
    "lz4": set(),
    "zstandard": set(),
    "tonic": set(),
    "nir": {"nir.layers", "nir.neurons", "nir.write", "nir.read"},
    "tensorflow": set(),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}
SPIKEJAX = [name for name in FILES if name.split(".")[0] == "spikejax"]


def inner_name(name: str) -> str:
    """spikejax.models.vgg -> models.vgg, and spikejax itself -> the empty name."""
    return name.removeprefix("spikejax").removeprefix(".")


def storey(name: str) -> str:
    """spikejax.models.vgg -> models."""
    return inner_name(name).split(".")[0]


def is_for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def at_import(tree: ast.AST):
    """Yields the nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not is_function and not is_for_types_only(node):
            yield node
            yield from at_import(node)


def imports(nodes) -> set[str]:
    """The modules named by the import statements, `from a import b` as a.b."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return found


def storeys_imported(tree: ast.AST) -> set[str]:
    """The storeys of spikejax that the module names, in functions too."""
    found, nodes = set(), set(ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes -= set(ast.walk(node))  # nothing is imported there
    for name in imports(nodes):
        if name.split(".")[0] == "spikejax":
            top = storey(name)
            found.add(top if top in STOREYS else "")
    return found


def functions(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_signature(node: ast.AST) -> bool:
    """A method of a Protocol: its body is `...`."""
    body = getattr(node, "body", [])
    return len(body) == 1 and ast.unparse(body[0]) == "..."


def without_docstring(tree: ast.Module, prefix: str = ""):
    """Yields the public functions, classes and methods that say nothing."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None and not is_signature(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from without_docstring(node, f"{prefix}{node.name}.")


def test_the_files_are_found():
    assert "spikejax.neurons" in FILES


@pytest.mark.parametrize("name", SPIKEJAX)
def test_imports_go_down_only(name):
    assert storey(name) in STOREYS, f"{FILES[name]}: add its storey to STOREYS."
    wrong = storeys_imported(TREES[name]) - STOREYS[storey(name)] - {storey(name)}
    assert not wrong, (
        f"{name} imports {sorted(wrong)}, which are not below it. Move the code, or "
        "hand the thing in as an argument."
    )


@pytest.mark.parametrize("name", FILES)
def test_imports_are_absolute(name):
    relative = {i for i in imports(ast.walk(TREES[name])) if i.startswith(".")}
    assert not relative, f"{name}: write {sorted(relative)} as spikejax.something"


@pytest.mark.parametrize("name", FILES)
def test_experiments_are_not_imported(name):
    found = imports(ast.walk(TREES[name]))
    wrong = {i for i in found if i.split(".")[0] == "experiments"}
    assert not wrong, (
        f"{name} imports {sorted(wrong)}: what experiments share is in spikejax."
    )


@pytest.mark.parametrize("name", FILES)
def test_optional_packages_are_imported_in_their_file_only(name):
    found = {i.split(".")[0] for i in imports(at_import(TREES[name]))}
    for package in found & set(OPTIONAL):
        homes = OPTIONAL[package]
        assert inner_name(name) in homes, (
            f"{name} imports {package}, which only an extra installs: "
            f"import it in {sorted(homes) or 'the function that needs it'}."
        )


def test_import_spikejax_needs_no_optional_package():
    todo, seen = ["spikejax"] if "spikejax" in FILES else [], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        found = imports(at_import(TREES[name]))
        optional = {i.split(".")[0] for i in found} & set(OPTIONAL)
        assert not optional, f"import spikejax imports {name}, which needs {optional}"
        parents = {i.rpartition(".")[0] for i in found}
        todo += ((found | parents) & set(FILES)) - seen


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    lines = len(FILES[name].read_text("utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{name}: {lines} lines; at most {MAX_FILE_LINES}"
    for node in functions(TREES[name]):
        lines = (node.end_lineno or 0) - node.lineno + 1
        assert lines <= MAX_FUNCTION_LINES, (
            f"{name}.{node.name}: {lines} lines; at most {MAX_FUNCTION_LINES}"
        )


def test_modules_that_a_network_is_made_of_are_in_the_reference():
    pages = "\n".join(p.read_text("utf-8") for p in (ROOT / "docs/api").glob("*.md"))
    parts = {storey(name) for name in SPIKEJAX} - {"data", "experiment", "nir", "train"}
    own = {"_compat", "relus", "check", "operations", "chips", "hlo"}  # parts of others
    for name in SPIKEJAX:
        is_module = FILES[name].name != "__init__.py"
        if is_module and storey(name) in parts and name.split(".")[-1] not in own:
            assert f"::: {name}\n" in pages, f"{name}: add it to a page of docs/api"


def test_files_of_tests_are_short():
    files = sorted((ROOT / "tests").rglob("*.py"))
    lines = {file.name: len(file.read_text("utf-8").splitlines()) for file in files}
    long = {name: count for name, count in lines.items() if count > MAX_FILE_LINES}
    assert not long, (
        f"{long}: at most {MAX_FILE_LINES} lines. Join tests that repeat others, or "
        "split the file by the noun that each part tests."
    )


@pytest.mark.parametrize("name", SPIKEJAX)
def test_errors_are_raised_not_asserted(name):
    lines = [n.lineno for n in ast.walk(TREES[name]) if isinstance(n, ast.Assert)]
    assert not lines, f"{name}: assert in lines {lines}: raise ValueError instead"


@pytest.mark.parametrize("name", FILES)
def test_what_is_public_has_a_docstring(name):
    tree = TREES[name]
    assert ast.get_docstring(tree), f"{name}: no docstring of the module"
    missing = list(without_docstring(tree)) if name in SPIKEJAX else []
    assert not missing, f"{name}: no docstring of {', '.join(missing)}"
