"""The folders that the studio may look into, and what lies in them. No torch here.

A path from a browser is taken only if it lies in one of them after all links are resolved. Looking for files follows no
links, passes over hidden names, and ends after so many names.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from yeonma.data.readers import ENDINGS, ending_of
from yeonma.errors import UserError, system_reason
from yeonma.files import default_cache_dir, existing_folder, user_path
from yeonma.messages import tr
from yeonma.run_folder.entries import RUN, is_checkpoint

MOST_NAMES = 20_000
"""Of files and folders that one look passes."""
DEEPEST = 6
"""Folders within folders, below a root."""
MOST_LISTED = 500
"""Of each kind."""
MOST_LOOKED_INTO = 1_000
"""Text files that are opened to see whether they are templates."""
MODEL_CONFIG = "config.json"
TEMPLATE_ENDING = ".txt"
LARGEST_TEMPLATE = 100_000
_NO_DATA = frozenset({TEMPLATE_ENDING, ".json"})
"""Endings that readers know, and that most files have which are no data."""


@dataclass
class Found:
    """What one look at the roots found, each kind in the order of the folders."""

    runs: list[Path] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    templates: list[Path] = field(default_factory=list)
    models: list[Path] = field(default_factory=list)
    is_whole: bool = True
    """Whether no bound ended the look."""


@dataclass(frozen=True)
class Roots:
    """The folders, with all links resolved."""

    folders: tuple[Path, ...]

    @staticmethod
    def of(written: Sequence[str]) -> Roots:
        """Raises UserError for what is no folder."""
        cure = tr("name a folder that exists")
        folders = [existing_folder(one, cure).resolve() for one in written]
        return Roots(tuple(dict.fromkeys(folders)))

    def resolve(self, written: str) -> Path:
        """The file or folder of a path, which counts from the first root if it is relative. Raises UserError if there
        is none, or if it lies in no root."""
        path = user_path(written)
        try:
            resolved = (self.folders[0] / path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                tr("cannot be read: {reason}", reason=system_reason(error)),
                place=written,
                cure=tr("choose one of the files that are listed"),
            ) from None
        if not self.hold(resolved):
            raise UserError(
                tr("it lies outside of the folders that the studio may look into"),
                place=written,
                cure=tr("start the studio with --root and its folder"),
            )
        return resolved

    def hold(self, path: Path) -> bool:
        """Whether a path without links and `..` lies in a root, or is one."""
        return any(path.is_relative_to(folder) for folder in self.folders)

    def name_of(self, path: Path) -> str:
        """A path as it is shown: from its root, and behind the root's own name if there are several."""
        root = next((folder for folder in self.folders if path.is_relative_to(folder)), None)
        if root is None:
            return str(path)
        inner = path.relative_to(root)
        return str(inner if len(self.folders) == 1 and path != root else Path(root.name) / inner)

    def look(self) -> Found:
        """Runs, data files, templates and models below the roots, nearest first."""
        found, names, looked_into = Found(), 0, 0
        waiting = deque((folder, 0) for folder in self.folders)
        seen: set[Path] = set()
        cache = default_cache_dir().resolve()  # token stores look like data
        while waiting:
            folder, depth = waiting.popleft()
            if folder in seen or folder == cache:
                continue
            seen.add(folder)
            files, folders = _entries(folder)
            names += len(files) + len(folders)
            if names > MOST_NAMES:
                found.is_whole = False
                break
            if RUN in files:
                found.runs.append(folder)
                continue
            if MODEL_CONFIG in files and any(name.endswith(".safetensors") for name in files):
                found.models.append(folder)
                continue
            found.data += (folder / name for name in files if _is_data(name))
            texts = [folder / name for name in files if name.lower().endswith(TEMPLATE_ENDING)]
            found.is_whole &= looked_into + len(texts) <= MOST_LOOKED_INTO
            found.templates += filter(_is_template, texts[: max(0, MOST_LOOKED_INTO - looked_into)])
            looked_into += len(texts)
            below = [folder / name for name in folders if not is_checkpoint(name)]
            if depth < DEEPEST:
                waiting += ((inner, depth + 1) for inner in below)
            elif below:
                found.is_whole = False
        for kind in (found.runs, found.data, found.templates, found.models):
            if len(kind) > MOST_LISTED:
                found.is_whole = False
                del kind[MOST_LISTED:]
        return found


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in a folder, sorted, without links and hidden ones."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in _few(entries):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
    except OSError:  # a folder of somebody else, or deleted meanwhile
        return [], []
    return sorted(files), sorted(folders)


def _few(entries: Iterator[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
    for count, entry in enumerate(entries):
        if count > MOST_NAMES:
            return
        yield entry


def _is_data(name: str) -> bool:
    ending = ending_of(Path(name))
    return ending in ENDINGS and ending not in _NO_DATA


def _is_template(path: Path) -> bool:
    """Whether a text file has a field in it."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_TEMPLATE + 1)
    except OSError:
        return False
    return len(content) <= LARGEST_TEMPLATE and b"{" in content and b"}" in content
