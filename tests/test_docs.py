"""Documentation: its examples run, and its links, commands and modules exist.

All blocks of a page that begin with ```python run in one namespace, in order. Code that
cannot run here is fenced as ```py.
"""

import ast
import doctest
import importlib
import json
import re
import runpy
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
COMMAND = re.compile(r"python -m experiments\.(\w+)((?: plan)?)([^`\n#&>|]*)")
WITH_EXAMPLES = [page for page in PAGES if BLOCK.search(page.read_text("utf-8"))]
MODULES = sorted((ROOT / "spikejax").rglob("*.py"))
SHOWN = [path for path in MODULES if ">>> " in path.read_text("utf-8")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_examples_are_found():
    assert {"README.md", "docs/convert.md"} <= set(map(name, WITH_EXAMPLES))


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    namespace = {"__name__": "example"}
    for block in BLOCK.finditer(text):
        before = text[: block.start(1)].count("\n")  # errors name the line of the page
        exec(compile("\n" * before + block[1], name(page), "exec"), namespace)


@pytest.mark.parametrize("path", SHOWN, ids=name)
def test_examples_of_docstrings_give_what_they_show(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried and not failed  # the output says which


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    links = LINK.findall(page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{name(page)} links to {missing}, which do not exist"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/api").glob("*.md")), ids=name)
def test_modules_of_the_reference_exist(page):
    modules = re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
    missing = [module for module in modules if source(module) is None]
    assert modules and not missing, f"{name(page)}: no {missing}"


@cache
def source(module: str) -> ast.Module | None:
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text("utf-8")) if path.exists() else None


def imports(code: str):
    """Yields (module, name) of what is imported from spikejax."""
    yield from imported(ast.parse(re.sub("^[!%].*", "", code, flags=re.MULTILINE)))


def imported(tree: ast.Module):
    for node in ast.walk(tree):
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and module.split(".")[0] == "spikejax":
            yield from ((module, alias.name) for alias in node.names)


def home(module: str, name: str) -> tuple[str, str]:
    """The module that defines a name which a package may only hand on."""
    if source(f"{module}.{name}"):
        return f"{module}.{name}", ""
    outer = handed_on(module).get(name)
    return home(outer, name) if outer else (module, name)


@cache
def handed_on(module: str) -> dict[str, str]:
    """{name: module} of what a module imports from others of the package."""
    return {inner: outer for outer, inner in imported(source(module))}


@cache
def documented(module: str) -> set[str]:
    """The names of a module that its page of the reference shows."""
    body = source(module).body
    found = {""} | {getattr(node, "name", "") for node in body}
    for node, after in zip(body, body[1:], strict=False):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found |= {getattr(target, "id", "") for target in targets}
    return found


def test_what_packages_and_pages_import_is_in_the_reference():
    pages = [page.read_text("utf-8") for page in PAGES]
    shown = set(re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE))
    codes = [p.read_text("utf-8") for p in (ROOT / "spikejax").rglob("__init__.py")]
    codes += re.findall(r"^```py(?:thon)?\n(.*?)^```$", "\n".join(pages), re.S | re.M)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        codes += ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    missing = set()
    for module, name in {found for code in codes for found in imports(code)}:
        module, name = home(module, name)
        if "._" in module or (not name and (ROOT / module.replace(".", "/")).is_dir()):
            continue
        if module not in shown or name not in documented(module):
            missing.add(f"{module}.{name}".rstrip("."))
    assert not missing, f"no page of docs/api shows {sorted(missing)}"


@cache
def flags():
    return runpy.run_path(str(ROOT / "docs" / "flags.py"))


def test_the_page_of_flags_is_what_the_scripts_have():
    page = (ROOT / "docs" / "flags.md").read_text("utf-8")
    assert page == flags()["page"](), "run python docs/flags.py"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_the_flags_that_they_name(page):
    text = page.read_text("utf-8").replace("\\\n", " ")
    for script, verb, rest in COMMAND.findall(text):
        known = flags()["scripts"]().get(script + verb, {})
        words = [word.strip("[].") for word in rest.split()]
        for word, value in zip(words, [*words[1:], ""], strict=False):
            if not word.startswith("--") or word == "--help" or script == "prepare":
                continue
            assert word in known or script.isupper(), f"{name(page)}: {script} {word}"
            choices = re.findall("`([^`]+)`", known[word].values if known else "")
            assert not choices or value in choices or value.isupper(), (
                f"{name(page)}: {word} {value}"
            )
