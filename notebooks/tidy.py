"""Takes outputs out of the notebooks, and writes the address of the repository in.

    python notebooks/tidy.py

The address stands in pyproject.toml, under project.urls.
"""

import json
import re
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ADDRESS = re.compile(r"(github(?:\.com)?)/[\w.-]+/spikejax")


def address() -> str:
    """OWNER/NAME of the repository on GitHub."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"].split("github.com/")[1]


def tidy(text: str) -> str:
    """The notebook as git keeps it."""
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
    kept = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    return ADDRESS.sub(rf"\1/{address()}", kept)


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        path.write_text(tidy(path.read_text("utf-8")), "utf-8")
