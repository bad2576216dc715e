"""What decides a model's numbers for given token ids, as one SHA-256: the key of numbers on disk."""

from __future__ import annotations

import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch

from yeonma.config.settings import Quantization
from yeonma.files import file_hash
from yeonma.model.adapter_config import CONFIG_FILE, WEIGHTS_FILE
from yeonma.model.base_content import known_hash
from yeonma.model.quantization import quantised_by
from yeonma.model.source import BaseSource


def weights_identity(
    form: int,
    source: BaseSource,
    adapter: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization,
    cache_dir: Path | None = None,
) -> str:
    """SHA-256 of weights, adapter folder, dtype, versions of the libraries, and `form`, the format of the numbers.

    Reads the weight files of a local model, unless their SHA-256 is known in `cache_dir`, by default the user's cache.
    A model on the hub is identified by its commit, `source.revision`.
    """
    folder = Path(source.name)
    base: list[str | None] = [source.name, source.revision]
    if folder.is_dir():
        weights = sorted(folder.glob("*.safetensors"))
        base = [file_hash(folder / "config.json"), *(known_hash(path, cache_dir) for path in weights)]
    files = None
    if adapter is not None:
        files = [file_hash(Path(adapter) / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]
    versions = [version(package) for package in ("torch", "transformers", "peft")]
    content = [form, base, files, str(dtype), device.type, versions]
    content += [quantised_by(quantization)] if quantization != "none" else []
    return sha256(json.dumps(content).encode()).hexdigest()
