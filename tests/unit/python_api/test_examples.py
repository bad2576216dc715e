"""The example notebooks: stored without outputs, with a cell of parameters, and alike in both languages."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
NAMES = ("titles.ipynb", "titles.ko.ipynb")


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]


def without_texts(source: str) -> str:
    """Code without comments and the contents of strings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_all_notebooks_are_known() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_without_outputs_and_has_parameters(name: str) -> None:
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", ())]
    assert tagged == code[:1]
    assert "MODEL = " in "".join(tagged[0]["source"])


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_resolve(name: str) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and all((EXAMPLES / link).is_file() for link in links)


def test_both_languages_have_the_same_cells() -> None:
    english, korean = (
        [(cell["cell_type"], "".join(cell["source"])) for cell in cells(name)] for name in NAMES
    )
    assert [kind for kind, _ in english] == [kind for kind, _ in korean]
    for (kind, ours), (_, theirs) in zip(english, korean, strict=True):
        if kind == "code":
            assert without_texts(ours) == without_texts(theirs)
