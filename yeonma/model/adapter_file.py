"""The weights file of an adapter folder: its header, and whether all of its numbers are finite. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from yeonma.errors import Problem, UserError, brief, system_reason
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.model.adapter_config import (
    CONFIG_FILE,
    PICKLED_FILE,
    SAVE_AGAIN,
    WEIGHTS_FILE,
    AdapterConfig,
    read_adapter_config,
)

NUMBERS_AT_ONCE = 1 << 22
DOWNLOAD = tr("download the adapter again, or save it again with PEFT")
_EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""The number formats that an adapter may have -> unsigned integers of their size, and the bits of the exponent, which
are all set in NaN and infinity."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file, by the header."""

    dtype: str
    """As safetensors names it: F32, BF16 ..."""
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""


def read_header(folder: str | Path) -> dict[str, StoredTensor]:
    """The tensors of the folder's weights file by their names, which is checked to be whole, but not read.

    Raises UserError if there is no such file, if it is truncated or damaged, and for tensors of integers.
    """
    path = user_path(folder) / WEIGHTS_FILE
    _check_there(path)
    try:
        with safe_open(path, "np"):  # checks that header and file fit each other
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, ValueError, RecursionError) as error:
        what = tr("truncated or damaged ({error})", error=brief(str(error)))
        raise UserError(what, place=str(path), cure=tr("download it again")) from error
    except OSError as error:
        raise UserError(
            tr("cannot be read ({value})", value=system_reason(error)), place=str(path)
        ) from error
    tensors = {
        name: StoredTensor(one["dtype"], tuple(one["shape"]), 8 + size + one["data_offsets"][0])
        for name, one in header.items()
        if name != "__metadata__"
    }
    if not tensors:
        raise UserError(tr("there are no tensors in it"), place=str(path), cure=DOWNLOAD)
    if odd := sorted(name for name, tensor in tensors.items() if tensor.dtype not in _EXPONENTS):
        what = tr(
            "{odd} is stored as {dtype}, which is no number format of an adapter",
            odd=some(odd),
            dtype=tensors[odd[0]].dtype,
        )
        raise UserError(what, place=str(path), cure=DOWNLOAD)
    return tensors


def _check_there(path: Path) -> None:
    if path.is_file():
        return
    folder = path.parent
    if (folder / PICKLED_FILE).is_file():
        what = tr(
            "the weights are pickled ({pickled_file}), which can run code when loaded",
            pickled_file=PICKLED_FILE,
        )
        cure = tr(
            "if you trust them, load the adapter once with PEFT and save_pretrained() it to a new folder"
        )
        raise UserError(what, place=str(folder), cure=cure)
    others = (
        sorted(name.name for name in folder.glob("*") if name.suffix in (".gguf", ".npz"))
        if folder.is_dir()
        else []
    )
    if others:
        what = tr(
            "there is no {weights_file}, only {others}, which PEFT did not write",
            weights_file=WEIGHTS_FILE,
            others=brief(others[0]),
        )
        raise UserError(what, place=str(folder), cure=tr("give an adapter in PEFT's format"))
    raise UserError(
        tr("{weights_file} is missing", weights_file=WEIGHTS_FILE),
        place=str(folder),
        cure=tr("give an adapter saved as safetensors"),
    )


def not_finite(folder: str | Path, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The names of the tensors with NaN or infinity. Reads a few million numbers at a time."""
    path = user_path(folder) / WEIGHTS_FILE
    found = []
    with path.open("rb") as file:
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            kind, exponent = _EXPONENTS[tensor.dtype]
            left = math.prod(tensor.shape)
            file.seek(tensor.start)
            while left > 0:
                bits = np.frombuffer(file.read(min(left, NUMBERS_AT_ONCE) * np.dtype(kind).itemsize), kind)
                left -= len(bits) or left
                if bool(np.any((bits & exponent) == exponent)):
                    found.append(name)
                    break
    return found


def check_adapter_files(folder: str | Path) -> AdapterConfig:
    """Checks config and weights of an adapter folder by themselves, without its base: keys, header, finite numbers.

    Returns the config. Raises UserError.
    """
    config = read_adapter_config(folder)
    tensors = read_header(folder)
    biases = sorted(name for name in tensors if name.endswith(".bias"))
    if config.trains_biases and biases:
        what = tr('it has "bias", which changes the base\'s own biases ({biases})', biases=some(biases))
        raise UserError(what, place=config.place, cure=SAVE_AGAIN)
    ranks = [config.keys["r"], *config.keys.get("rank_pattern", {}).values()]
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if max(ranks) > largest:  # before PEFT makes layers of this rank
        what = tr("it has the rank {ranks}, and no tensor is as large", ranks=max(ranks))
        raise UserError(what, place=config.place, cure=DOWNLOAD)
    if bad := not_finite(folder, tensors):
        place = str(config.folder / WEIGHTS_FILE)
        raise UserError(
            [
                Problem(
                    tr("NaN or infinity in {bad}", bad=some(bad)),
                    place,
                    tr("use an earlier checkpoint, or download it again"),
                )
            ]
        )
    return config


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    shown = ", ".join(brief(name, 120) for name in names[:3])
    return tr("{names} and {more} more", names=shown, more=len(names) - 3) if len(names) > 3 else shown


def is_adapter(folder: str | Path) -> bool:
    """Whether PEFT's config is in the folder."""
    return (user_path(folder) / CONFIG_FILE).is_file()
