"""What is released: supported versions, pins, files, address."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spikejax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13")


def pins(file: str, python: str) -> dict[str, str]:
    """Return the versions by name that a file of constraints pins for a Python."""
    found = {}
    for line in (ROOT / file).read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{file}: {name} has two pins on {python}"
            found[name] = str(pin.specifier).removeprefix("==")
    return found


def requirements(extra: str) -> list[Requirement]:
    """Return what the package needs with an extra, those inside it too."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for line in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            found += [r for inner in requirement.extras for r in requirements(inner)]
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize(
    "file, extra, python",
    [("constraints.txt", extra, p) for extra in ("dev", "docs") for p in PYTHONS]
    + [("constraints-oldest.txt", "experiments", "3.11")],
)
def test_what_is_installed_is_pinned(file, extra, python):
    pinned = pins(file, python)
    for requirement in requirements(extra):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version and version in requirement.specifier, f"{file}: {requirement}"


def test_the_oldest_pins_are_the_oldest_versions_allowed():
    oldest = pins("constraints-oldest.txt", "3.11")
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        assert f">={oldest[requirement.name]}" in str(requirement.specifier)


def test_the_table_of_supported_versions_is_what_is_tested():
    readme = (ROOT / "README.md").read_text("utf-8")
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    row = r"\| (3\.\d+) \| ([\d.]+).*? \| ([\d.]+) \| `make ([\w-]+).*` \|"
    rows = re.findall(row, readme)
    assert {python for python, *_ in rows} == set(PYTHONS)
    for python, jax, flax, target in rows:
        oldest = "-oldest" if target == "test-oldest" else ""
        tested = pins(f"constraints{oldest}.txt", python)
        assert (jax, flax) == (tested["jax"], tested["flax"]), python
        assert f'{{python: "{python}", target: {target}}}' in workflow


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    version = spikejax.__version__
    assert re.findall(r"^version: (\S+)$", citation, re.MULTILINE) == [version]
    assert re.search(r"^## ([\d.]+)", changes, re.MULTILINE)[1] == version


def test_files_that_are_no_code_are_in_the_wheel():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    package = ROOT / "spikejax"
    included = {
        path
        for pattern in options["setuptools"]["package-data"]["spikejax"]
        for path in package.glob(pattern)
    }
    others = {path for path in package.rglob("*") if path.is_file()}
    others = {path for path in others if path.suffix not in (".py", ".pyc")}
    assert included == others


def test_the_owner_of_the_repository_is_in_one_place():
    kinds = {".py", ".md", ".ipynb", ".toml", ".txt", ".yml", ".cff", ".in"}
    found = []
    for place in (".", "docs", "experiments", "notebooks", "spikejax", "tests"):
        for path in (ROOT / place).glob("*" if place == "." else "**/*"):
            if path.suffix in kinds or path.name == "Makefile":
                count = path.read_text("utf-8").count("OWN" + "ER")
                found += [path.name] * count
    is_known = "Repository" in PROJECT["urls"]
    assert found == ([] if is_known else ["pyproject.toml"])
