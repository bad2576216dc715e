"""Optional packages: the versions that Yeonma is tested with, and the command that installs one that is missing.

Yeonma itself is on no package index, so that no message can name its extras.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

MAIN = ("torch", "transformers", "peft", "tokenizers", "safetensors", "datasets")
"""Packages whose versions decide most about a run."""
TESTED = {
    "antlr4-python3-runtime": "4.13.2",
    "bitsandbytes": "0.50.2",
    "compressed-tensors": "0.20.1",
    "gguf": "0.19.0",
    "jsonschema": "4.26.0",
    "kiwipiepy": "0.24.1",
    "llguidance": "1.9.1",
    "lm_eval": "0.4.13",
    "math-verify": "0.9.0",
    "mistral-common": "1.13.1",
    "mlflow": "3.18.0",
    "openpyxl": "3.1.5",
    "pydantic": "2.14.4",
    "sacrebleu": "2.6.0",
    "sentencepiece": "0.2.3",
    "shtab": "1.13.0",
    "starlette": "1.10.0",
    "tensorboard": "2.21.0",
    "tiktoken": "0.14.0",
    "trackio": "0.43.0",
    "uvicorn": "0.54.0",
    "wandb": "0.31.0",
    "xllamacpp": "2026.10.11549",
}
"""Name on PyPI -> version. requirements.txt has the same for those that it installs."""


def install(*packages: str) -> str:
    """The command that installs packages, by their names on PyPI."""
    return " ".join(["pip install", *(f'"{package}=={TESTED[package]}"' for package in packages)])


def version_of(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
