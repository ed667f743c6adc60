"""Documentation: its examples run, and its links, commands and modules exist.

All blocks of a page that begin with ```python run in one namespace, in order. Code that
cannot run here is fenced as ```py.
"""

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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page):
    links = LINK.findall(page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{name(page)} links to {missing}, which do not exist"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/api").glob("*.md")), ids=name)
def test_modules_of_the_reference_exist(page):
    modules = re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
    paths = [ROOT / module.replace(".", "/") for module in modules]
    missing = [p.name for p in paths if not p.with_suffix(".py").exists()]
    assert modules and not missing, f"{name(page)}: no {missing}"


@cache
def flags():
    pytest.importorskip("tyro")
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
