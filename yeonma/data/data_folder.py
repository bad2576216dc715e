"""The data files of a path: the file itself, or those of one split in a folder.

A folder may be what `git clone` leaves of a data set on the hub. Its splits stand in the README's `configs`, or in the
names of files and folders, as the library `datasets` reads them.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from yeonma.config.yaml_text import read_items
from yeonma.data.library_sets import needs_code, unknown_split
from yeonma.data.readers import GIVE_FILES, KNOWN_FILES, ending_of
from yeonma.data.words import with_more
from yeonma.errors import UserError, brief, did_you_mean
from yeonma.messages import counted, tr

# Files about the data, often next to it.
_SIDE_FILES = ("dataset_info.json", "dataset_infos.json", "config.json")
_CARD = "README.md"
_CARD_CHARACTERS = 1_000_000
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_SPLIT_WORD = re.compile(rf"(?:\A|[-_. 0-9])({'|'.join(_SPLIT_OF_WORD)})(?:[-_. 0-9]|\Z)")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
"""The files of a split with any name, as `push_to_hub` names them."""
_DATA_FOLDERS = ("data", *_SPLIT_OF_WORD)
"""Folders in which the data of a folder without files may lie."""
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
# Other tools' endings -> what to do with such a file.
_CURES = {
    ".xls": tr("save it as .xlsx"),
    ".ods": tr("save it as .xlsx"),
    ".zip": tr("unpack it"),
    ".bz2": tr("unpack it"),
    ".xz": tr("unpack it"),
    ".gz": tr("unpack it; a text file may stay packed if its name says so, as in rows.jsonl.gz"),
    ".zst": tr("unpack it; a text file may stay packed if its name says so, as in rows.jsonl.zst"),
}


@dataclass(frozen=True)
class DataFile:
    """A file, and its name in messages."""

    path: Path
    name: str


@dataclass(frozen=True)
class FoundFiles:
    """Files of one format in the order in which they are read, and lines for the user about what is not read."""

    files: tuple[DataFile, ...]
    notes: tuple[str, ...] = ()


def files_of(name: str, path: Path, split: str, config: str | None = None) -> FoundFiles:
    """The file, or the files of a folder that belong to `split`; all of them if the folder has one split or none.

    `config` names one of the README's `configs`. Raises UserError unless they are regular files of one format, for an
    unknown split or config, and for data sets that run Python code.
    """
    if not path.is_dir():
        return FoundFiles(_checked([DataFile(path, name)]))
    name = name.rstrip("/") or name
    scripts = sorted(file.name for file in path.iterdir() if file.suffix == ".py")
    if f"{path.resolve().name}.py" in scripts:
        raise needs_code(name, f"{path.resolve().name}.py")
    card = _Card.of(path, name)
    if card.configs or config is not None:
        found = _files_of_config(name, path, split, _chosen_config(name, card.configs, config))
    else:
        found = _files_by_name(name, path, split, scripts)
    endings = sorted({ending_of(file.path) for file in found.files})
    if len(endings) > 1:
        cure = tr("keep one format in a folder, or give one file")
        raise UserError(
            tr("files of several formats: {endings}", endings=", ".join(endings)), place=name, cure=cure
        )
    return FoundFiles(_checked(found.files), (*card.notes, *found.notes))


# Splits by the names of files


def _files_by_name(name: str, path: Path, split: str, scripts: Sequence[str] = ()) -> FoundFiles:
    files = _data_files(path, path.glob("*"))
    if not files:
        if scripts:
            raise needs_code(name, scripts[0])
        folders = [folder for folder in path.glob("*") if folder.name.lower() in _DATA_FOLDERS]
        files = _data_files(path, (file for folder in folders for file in folder.rglob("*")))
    if not files:
        below = sorted({file.parent.name for file in _data_files(path, path.glob("*/*"))})
        cure = tr("give {known_files}, or a folder of such files", known_files=KNOWN_FILES)
        cure = tr("give the folder inside it: {below}", below=", ".join(below)) if below else cure
        raise UserError(tr("a folder without data files"), place=name, cure=cure)
    by_split: dict[str, list[DataFile]] = {}
    for file in files:
        shown = file.relative_to(path).as_posix()
        by_split.setdefault(_split_of(shown), []).append(DataFile(file, f"{name}/{shown}"))
    splits = sorted(other for other in by_split if other)
    if len(splits) <= 1:
        other_split = splits and splits[0] != _SPLIT_OF_WORD.get(split, split)
        notes = (
            (tr('{name}: its files are those of the split "{splits}"', name=name, splits=splits[0]),)
            if other_split
            else ()
        )
        every = [file for group in by_split.values() for file in group]
        return FoundFiles(tuple(sorted(every, key=lambda file: file.name)), notes)
    wanted = split if split in by_split else _SPLIT_OF_WORD.get(split, split)
    if wanted not in splits:
        raise unknown_split(name, split, splits)
    return FoundFiles(tuple(by_split[wanted]), _not_read(name, wanted, by_split))


def _data_files(base: Path, paths: Iterable[Path]) -> list[Path]:
    """The data files among `paths`, sorted, without hidden ones and those below hidden folders."""
    return sorted(
        path
        for path in paths
        if ending_of(path)
        and path.name not in _SIDE_FILES
        and not any(part.startswith(".") for part in path.relative_to(base).parts)
    )


def _split_of(path: str) -> str:
    """The split that a path below a folder names, in a folder's name, a shard's or a file's; empty if none."""
    *folders, file = PurePosixPath(path).parts
    for folder in folders:
        if word := _SPLIT_WORD.search(folder.lower()):
            return _SPLIT_OF_WORD[word[1]]
    if shard := _SHARD.match(file):
        return _SPLIT_OF_WORD.get(shard[1], shard[1])
    word = _SPLIT_WORD.search(file.partition(".")[0].lower()) or _SPLIT_WORD.search(file.lower())
    return _SPLIT_OF_WORD[word[1]] if word else ""


def _not_read(name: str, split: str, by_split: Mapping[str, Sequence[DataFile]]) -> tuple[str, ...]:
    others = [brief(other) for other in sorted(by_split) if other and other != split]
    others += [PurePosixPath(file.name).name for file in by_split.get("", ())]
    count = len(by_split[split])
    return (_read_and_not(name, split, count, with_more(others, 10)),)


def _read_and_not(name: str, split: str, count: int, others: str) -> str:
    return tr(
        '{name}: the split "{split}" is read ({files}); not {others}',
        name=name,
        split=split,
        files=counted(count, "file"),
        others=others,
    )


# Splits by the README


@dataclass(frozen=True)
class _Config:
    """One of the `configs` of a README: `files` has the patterns of each split; None if they go by name."""

    name: str
    base: str
    files: Mapping[str, Sequence[str]] | None
    is_default: bool


@dataclass(frozen=True)
class _Card:
    """What a folder's README says about its files."""

    configs: tuple[_Config, ...] = ()
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(folder: Path, name: str) -> _Card:
        """The card of a folder; an empty one if there is none. If it cannot be understood, a note says so."""
        path = folder / _CARD
        if not path.is_file():
            return _Card()
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            matter = _FRONT_MATTER.match(file.read(_CARD_CHARACTERS))
        if matter is None:
            return _Card()
        place = f"{name}/{_CARD}"
        try:
            entries: dict[object, Any] = {key: value for key, value, _ in read_items(matter[1], place)}
            return _Card(tuple(_config(entry) for entry in entries.get("configs") or ()))
        except UserError as error:
            reason = error.problems[0]
            return _Card(
                notes=(
                    tr(
                        "{place}: {what}, so files are chosen by their names",
                        place=reason.place,
                        what=reason.what,
                    ),
                )
            )
        except (AttributeError, KeyError, TypeError):
            return _Card(
                notes=(
                    tr(
                        "{name}/{card}: unknown form of configs, so files are chosen by their names",
                        name=name,
                        card=_CARD,
                    ),
                )
            )


def _config(entry: Any) -> _Config:
    """Raises AttributeError, KeyError or TypeError for what is no config."""
    files = entry.get("data_files")
    if isinstance(files, str):
        files = {"train": [files]}
    elif isinstance(files, list) and all(isinstance(pattern, str) for pattern in files):
        files = {"train": files}
    elif isinstance(files, list):
        files = {str(part["split"]): _patterns(part["path"]) for part in files}
    elif files is not None:
        files = {str(split): _patterns(patterns) for split, patterns in files.items()}
    base = str(entry.get("data_dir") or ".")
    return _Config(str(entry["config_name"]), base, files, entry.get("default") is True)


def _patterns(written: Any) -> list[str]:
    patterns = [written] if isinstance(written, str) else list(written)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError("a pattern is text")
    return patterns


def _chosen_config(name: str, configs: Sequence[_Config], config: str | None) -> _Config:
    names = [entry.name for entry in configs]
    if config is not None:
        if config not in names:
            cure = did_you_mean(config, names) or tr(
                "its README names {names}", names=", ".join(map(brief, names[:20])) or tr("none")
            )
            raise UserError(tr('no config "{config}"', config=brief(config)), place=name, cure=cure)
        return configs[names.index(config)]
    defaults = [entry for entry in configs if entry.is_default or entry.name == "default"] or configs
    if len(defaults) > 1:
        cure = tr("name one: {name}:{defaults}", name=name, defaults=brief(defaults[0].name))
        raise UserError(
            tr("several configs: {brief}", brief=", ".join(map(brief, names[:20]))), place=name, cure=cure
        )
    return defaults[0]


def _files_of_config(name: str, path: Path, split: str, config: _Config) -> FoundFiles:
    base, place = path / _inside(config.base, f"{name}/{_CARD}"), f"{name}/{_CARD}"
    if not base.is_dir():
        raise UserError(
            tr('no folder "{base}"', base=brief(config.base)),
            place=place,
            cure=tr("download the whole data set"),
        )
    if config.files is None:
        shown = f"{name}/{config.base}" if config.base != "." else name
        return _files_by_name(shown, base, split)
    wanted = split if split in config.files else _SPLIT_OF_WORD.get(split, split)
    if wanted not in config.files:
        raise unknown_split(name, split, list(config.files))
    files: dict[Path, DataFile] = {}
    for pattern in config.files[wanted]:
        for file in _data_files(path, base.glob(_inside(pattern, place))):
            files.setdefault(file, DataFile(file, f"{name}/{file.relative_to(path).as_posix()}"))
    if not files:
        patterns = ", ".join(map(brief, config.files[wanted][:5]))
        cure = tr("download the whole data set, or name a file")
        raise UserError(
            tr(
                'no data files for the split "{wanted}" ({patterns})', wanted=brief(wanted), patterns=patterns
            ),
            place=place,
            cure=cure,
        )
    others = [brief(other) for other in config.files if other != wanted]
    count = len(files)
    notes = [_read_and_not(name, wanted, count, ", ".join(others[:10]))]
    return FoundFiles(tuple(files.values()), tuple(notes if others else ()))


def _inside(pattern: str, place: str) -> str:
    """A pattern of files below the folder. Raises UserError for one that leads out of it."""
    path = PurePosixPath(pattern)
    if path.is_absolute() or ".." in path.parts or "://" in pattern or "\0" in pattern:
        problem = tr('"{pattern}" is not inside the folder', pattern=brief(pattern))
        raise UserError(problem, place=place, cure=tr("download its files, and name them with --data_path"))
    return f"{pattern}/*" if path.name == "**" else pattern  # as in `datasets`, ** are files at any depth


def _checked(files: Sequence[DataFile]) -> tuple[DataFile, ...]:
    for file in files:
        status = file.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(
                tr("not a regular file"),
                place=file.name,
                cure=GIVE_FILES,
            )
        ending = file.path.suffix.lower()
        if ending == ".py":
            raise needs_code(file.name, file.name)
        if not ending_of(file.path):
            cure = _CURES.get(
                ending, tr("give {known_files}, or a folder of such files", known_files=KNOWN_FILES)
            )
            problem = (
                tr("{ending} files cannot be read", ending=ending) if ending else tr("the file has no ending")
            )
            raise UserError(problem, place=file.name, cure=cure)
        if status.st_size <= _POINTER_BYTES:
            with file.path.open("rb") as content:
                if content.read(len(_POINTER)) == _POINTER:
                    problem = tr("a pointer of Git LFS, not the data itself")
                    raise UserError(problem, place=file.name, cure=tr("run `git lfs pull` in its folder"))
    return tuple(files)
