"""The rules of the house, checked on the source: docs/design.md says why."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("spikejax", "experiments")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

CELLS = {"compat", "surrogate", "neurons", "unroll", "convolution", "pooling"}
LAYERS = CELLS | {"layers", "norm"}
NETWORKS = LAYERS | {"encode", "losses", "models", "models.vgg", "models.resnet"}
NETWORKS |= {"windows", "recurrent", "mixer", "models.general", "models.recurrent"}
DATA = {"data", "data.augment", "data.crop", "data.split", "data.files"}
DATA |= {"data.sources", "data.images"}
EVENTS = {"data.aedat4", "data.recordings", "data.frames", "data.listing"}
EVENTS |= {"data.events"}
CONVERT = {"quant", "swap", "conversion", "stream"}
NIR = {"nodes", "nir.graph", "nir.trace", "nir.layers", "nir.neurons"}
RUN = {"sharding", "processes", "checkpoint", "progress", "step", "train", "folder"}
RUN |= {"settings", "recipe", "compiler"}

# Room -> the rooms of spikejax that it may import. Down only, and no side room
# (train, energy, plot, data) another one.
HOUSE = {
    "": NETWORKS | CONVERT | {"sharding", "energy"},
    "compat": set(),
    "surrogate": set(),
    "neurons": {"surrogate"},
    "unroll": {"compat"},
    "convolution": set(),
    "pooling": set(),
    "encode": {"compat"},
    "losses": {"compat"},
    "layers": CELLS,
    "norm": CELLS,
    "quant": LAYERS,
    "windows": set(),
    "recurrent": LAYERS,
    "mixer": LAYERS | {"windows", "recurrent"},
    "models": {"models.vgg", "models.resnet", "models.general"},
    "models.vgg": LAYERS,
    "models.resnet": LAYERS,
    "models.general": LAYERS | {"mixer", "windows"},
    "models.recurrent": LAYERS | {"recurrent"},
    "data": DATA - {"data"},
    "data.augment": set(),
    "data.crop": set(),
    "data.split": {"data.crop"},
    "data.files": {"data.split"},
    "data.sources": {"data.split"},
    "data.images": DATA - {"data", "data.images"},
    "data.aedat4": set(),
    "data.recordings": {"data.aedat4"},
    "data.frames": {"data.augment", "data.recordings"},
    "data.listing": {"data.recordings"},
    "data.events": {"data.split", "cache"} | EVENTS - {"data.events", "data.aedat4"},
    "checksum": set(),
    "sharding": {"compat", "checksum"},
    "processes": set(),
    "cache": {"processes"},
    "store": {"checksum"},
    "checkpoint": {"compat", "checksum", "processes", "store"},
    "folder": {"processes"},
    "progress": set(),
    "recipe": {"settings"},
    "compiler": set(),
    "step": {"recipe"},
    "train": LAYERS | RUN - {"train", "folder"} | {"checksum"},
    "energy": LAYERS,
    "swap": LAYERS | {"quant"},
    "conversion": LAYERS | {"quant", "swap"},
    "stream": LAYERS | {"quant", "swap"},
    "live": LAYERS,
    "nodes": LAYERS,
    "nir": NIR | {"nir.write", "nir.read"},
    "nir.graph": LAYERS,
    "nir.trace": LAYERS | {"swap"},
    "nir.layers": LAYERS | {"nodes"},
    "nir.neurons": LAYERS | {"nodes", "nir.layers", "quant"},
    "nir.write": LAYERS | NIR | CONVERT | {"recurrent"},
    "nir.read": LAYERS | NIR,
    "importer": NETWORKS | {"nodes"},
    "plot": LAYERS | {"quant"},
    "chips": set(),
    "collectives": set(),
    "traffic": set(),
    "plan": {"chips", "collectives", "traffic", "sharding", "recipe", "step", "train"},
    "chart": {"plot"},
    "flags": set(),
    "settings": set(),
    "network": NETWORKS,
    "experiment": NETWORKS
    | DATA
    | EVENTS
    | RUN
    | CONVERT
    | {"", "cache", "network", "energy", "live", "plot", "chart"},
}
EXPERIMENT = set(HOUSE) - {""}

# Packages that only extras install -> the rooms that may need them to be imported.
OPTIONAL = {
    "PIL": {"data.augment", "data.crop", "data.split"},
    "array_record": {"data.sources"},
    "grain": {"data.images"},
    "sklearn": {"data.sources", "data.images"},
    "tensorflow_datasets": {"data.sources", "data.images"},
    "matplotlib": {"plot", "chart"},
    "rich": {"progress"},
    "tensorboardX": {"progress"},
    "tyro": {"flags"},
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


def room(name: str) -> str:
    """spikejax.models.vgg -> models.vgg, and spikejax itself -> the empty name."""
    return name.removeprefix("spikejax").removeprefix(".")


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


def rooms_imported(tree: ast.AST) -> set[str]:
    """The rooms of spikejax that the module names, in functions too."""
    found = set()
    for name in imports(ast.walk(tree)):
        if name.split(".")[0] == "spikejax":
            is_module = name in FILES or room(name) in HOUSE
            found.add(room(name if is_module else name.rpartition(".")[0]))
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
    assert room(name) in HOUSE, (
        f"{FILES[name]} is not in the table HOUSE. Add it to tests/test_design.py "
        "with the rooms that it may import, and to the table in docs/design.md."
    )
    wrong = rooms_imported(TREES[name]) - HOUSE[room(name)]
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


def test_experiments_import_rooms_that_exist():
    for name in set(FILES) - set(SPIKEJAX):
        wrong = rooms_imported(TREES[name]) - EXPERIMENT - {""}
        assert not wrong, f"{name} imports {sorted(wrong)}: no such rooms in HOUSE"


@pytest.mark.parametrize("name", FILES)
def test_optional_packages_are_imported_in_their_room_only(name):
    found = {i.split(".")[0] for i in imports(at_import(TREES[name]))}
    is_experiment = not name.startswith("spikejax")
    for package in found & set(OPTIONAL):
        homes = OPTIONAL[package]
        assert room(name) in homes or (is_experiment and package == "tyro"), (
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
