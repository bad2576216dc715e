"""The safetensors files of a base model, whose tensors are read when they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.source import BaseSource

if TYPE_CHECKING:
    import torch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(source: BaseSource, *, download: bool = True) -> list[Path]:
    """The base's safetensors files, downloaded if they are on the hub, unless `download` is False. Raises UserError if
    there are none."""
    if (whole := file_of(source, WEIGHTS, download=download)) is not None:
        return [whole]
    index = file_of(source, INDEX, download=download)
    if index is None:
        raise UserError(
            tr("no safetensors weights"), place=source.name, cure=tr("give a base model that has them")
        )
    names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    paths = [file_of(source, name, download=download) for name in names]
    if missing := [name for name, path in zip(names, paths, strict=True) if path is None]:
        raise UserError(
            tr("missing shards: {missing}", missing=", ".join(missing)),
            place=source.name,
            cure=tr("download them again"),
        )
    return [path for path in paths if path is not None]


def file_of(source: BaseSource, name: str, *, download: bool = True) -> Path | None:
    """A file of the base, downloaded if it is on the hub; None if it has no such file. `download` False looks only at
    what is on this machine."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(
            source.name,
            name,
            revision=source.revision,
            local_files_only=not download,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=download,
        )
    except OSError as error:
        first = str(error).splitlines()[0]
        raise UserError(
            tr("cannot download {name} ({first})", name=name, first=first),
            place=source.name,
            cure=tr("check your network"),
        ) from error
    return None if path is None else Path(path)


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that is read when it is indexed, as transformers indexes the slices of a safetensors file."""

    read: Callable[[], torch.Tensor]
    dtype: str
    """As safetensors names it: F32, BF16, F8_E4M3, U8 ..."""

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]


def stored_tensors(files: Sequence[Path]) -> dict[str, LazyTensor]:
    """Every tensor of the files by its name, in their order."""
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        file = safe_open(path, "pt")  # mapped into memory as long as one of its tensors is referred to
        for name in file.keys():  # noqa: SIM118
            tensors[name] = LazyTensor(partial(file.get_tensor, name), str(file.get_slice(name).get_dtype()))
    return tensors
