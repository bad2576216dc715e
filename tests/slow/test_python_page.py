"""Runs the Python page's code, and the example notebooks cell by cell in a real kernel, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters import tiny_base
from tests.notebooks import open_notebook
from tests.tokenizers import byte_level

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
NAMED_MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B")
"""The pages' models, which a tiny one stands for."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("models") / "base", byte_level())


def with_local_model(code: str, base: Path) -> str:
    for name in NAMED_MODELS:
        code = code.replace(f'"{name}"', repr(str(base)))
    return code


@pytest.mark.parametrize("page", ["python.md", "python.ko.md"])
def test_the_code_of_the_page_runs_in_order(page: str, base: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    code = with_local_model("\n".join(blocks), base)
    assert str(base) in code
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "titles: finished after 2 steps" in done.stdout
    for file in ("titles/README.md", "report/report.html", "titles-merged/model.safetensors"):
        assert (tmp_path / file).is_file(), file


@pytest.mark.parametrize("name", ["titles.ipynb", "titles.ko.ipynb"])
def test_an_example_notebook_runs_from_top_to_bottom(name: str, base: Path, tmp_path: Path) -> None:
    """As written, but for the cell of parameters: a tiny model, and one epoch."""
    notebook = json.loads((ROOT / "examples" / name).read_text(encoding="utf-8"))
    shown = []
    with open_notebook(tmp_path) as opened:
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                continue
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", ()):
                source = with_local_model(source, base).replace("EPOCHS = 2", "EPOCHS = 1")
                assert str(base) in source and "EPOCHS = 1" in source
            done = opened.run(source)
            assert done.error is None, done.error
            shown.append(done)
    pages = [data["text/html"] for cell in shown for data in cell.data if "text/html" in data]
    assert sum("<iframe" in page for page in pages) == 1  # what is trained
    assert sum("<progress" in page for page in pages) == 1  # the block
    assert sum("data:image/svg+xml" in page for page in pages) == 2  # the block's curve, and the run's
    assert "nothing differs" in shown[-1].data[0]["text/plain"]
