"""Cells run in a real kernel of IPython, as a notebook runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS_PER_CELL = 300


@dataclass(frozen=True)
class Cell:
    """What a cell left: the text of its streams, its outputs by MIME type, and its error."""

    out: str
    err: str
    data: list[dict[str, Any]]
    error: tuple[str, list[str]] | None
    """The exception's name, and the lines that are shown of it."""


@dataclass
class Notebook:
    """A notebook whose kernel runs in a folder."""

    client: Any
    cells: list[Any] = field(default_factory=list)

    def run(self, source: str) -> Cell:
        """Runs one more cell to its end."""
        cell = self.start(source)
        return read_cell(self.client.execute_cell(cell, len(self.cells) - 1))

    def start(self, source: str) -> Any:
        """Adds a cell, which is not run yet."""
        import nbformat

        cell = nbformat.v4.new_code_cell(source)
        self.client.nb.cells.append(cell)
        self.cells.append(cell)
        return cell

    def interrupt(self) -> None:
        """What the stop button does."""
        from nbclient.util import run_sync

        run_sync(self.client.km.interrupt_kernel)()


def read_cell(cell: Any) -> Cell:
    """The outputs of a cell that was run."""
    streams = {"stdout": "", "stderr": ""}
    data, error = [], None
    for output in cell.outputs:
        if output.output_type == "stream":
            streams[output.name] += output.text
        elif output.output_type == "error":
            error = output.ename, list(output.traceback)
        else:
            data.append(dict(output.data))
    return Cell(streams["stdout"], streams["stderr"], data, error)


def require_kernel() -> None:
    """Skips the test where no kernel can run."""
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed: no notebook can be run")


@contextmanager
def open_notebook(folder: Path, cells: Sequence[str] = ()) -> Iterator[Notebook]:
    """A notebook with a kernel of its own, which runs in `folder` and imports this checkout's package."""
    require_kernel()
    import nbformat
    from nbclient import NotebookClient

    client = NotebookClient(
        nbformat.v4.new_notebook(),
        timeout=SECONDS_PER_CELL,
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop(
        "PYTEST_CURRENT_TEST", None
    )  # with it a kernel shows no output of processes that it starts
    with client.setup_kernel(env=environment):
        notebook = Notebook(client)
        for source in cells:
            notebook.run(source)
        yield notebook
