"""Takes outputs out of the notebooks, and writes their badge and first cell of code.

    python notebooks/tidy.py

The address of the repository is in pyproject.toml, under project.urls. Without it there
is no badge for Colab, and spikejax is installed from files alone.
"""

import json
import re
import tomllib
from pathlib import Path

HERE = Path(__file__).parent

INSTALL = """\
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# Where spikejax is missing, as in Colab: from a wheel beside this notebook, or a clone.
if not list(metadata.distributions(name="spikejax")):
    here = Path.cwd()
    clones = (here.parent, here, here / "spikejax")
    paths = sorted(here.glob("spikejax-*.whl"), reverse=True)  # the newest first
    paths += [path for path in clones if (path / "spikejax/layers.py").exists()]
    packages = [f"{path}[EXTRAS]" for path in paths]
"""

FROM_GITHUB = """\
    packages.append("spikejax[EXTRAS] @ git+https://github.com/ADDRESS")
"""

FROM_FILES_ONLY = """\
    if not packages:
        raise FileNotFoundError(
            f"No spikejax in {here}: upload spikejax-*.whl (make dist), or a clone."
        )
"""

RUN = """\
    pip = [sys.executable, "-m", "pip", "install", "-q", packages[0]]
    subprocess.run(pip, check=True)"""


def address() -> str | None:
    """Return the repository's owner/name on GitHub, if it has one."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    url = project["urls"].get("Repository")
    return url and url.split("github.com/")[1].rstrip("/").removesuffix(".git")


def badge(place: str) -> list[str]:
    """Return the lines of the link that opens a file of the repository in Colab."""
    colab = "https://colab.research.google.com"
    image = f"[![Open in Colab]({colab}/assets/colab-badge.svg)]"
    return [f"{image}({colab}/github/{place})\n", "\n"]


def tidy(text: str, name: str, address: str | None) -> str:
    """Return the notebook of that file name as git keeps it."""
    notebook = json.loads(text)
    notebook["metadata"] = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}
    title, install = notebook["cells"][:2]
    lines = title["source"]
    if "[![Open in Colab]" in lines[2]:
        del lines[2:4]
    if address:
        lines[2:2] = badge(f"{address}/blob/main/notebooks/{name}")
    extras = re.search(r"\[(experiments[\w,]*)\]", "".join(install["source"]))
    last = FROM_GITHUB if address else FROM_FILES_ONLY
    code = (INSTALL + last + RUN).replace("EXTRAS", extras[1] if extras else "")
    install["source"] = code.replace("ADDRESS", address or "").splitlines(True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        kept = tidy(path.read_text("utf-8"), path.name, address())
        path.write_text(kept, "utf-8")
