"""What decides a model's numbers for given token ids, as one SHA-256: the key of numbers on disk."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from yeonma.config.settings import Quantization
from yeonma.files import content_key, file_hash
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
    return identity_of([form, base], adapter, dtype, device, quantization)


def identity_of(
    base: Sequence[object],
    adapter: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization,
) -> str:
    """SHA-256 of what names the base's weights, the adapter folder, the number format and the libraries' versions."""
    files = None
    if adapter is not None:
        files = [file_hash(Path(adapter) / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]
    versions = [version(package) for package in ("torch", "transformers", "peft")]
    quantiser = [quantised_by(quantization)] if quantization != "none" else []
    return content_key(*base, files, str(dtype), device.type, versions, *quantiser)
