"""A path as a user writes it, which may be one that no file can have, or that nothing may be written to."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

from yeonma.errors import UserError


def user_path(written: str | Path, place: str = "") -> Path:
    """The path, with `~` filled in; whether something lies there is not looked at.

    Raises UserError, with `place` or what was written, for what can be no path here: too long a name, a NUL, `~` of
    nobody, links in a circle, a folder that may not be entered. After it, `is_dir` and its like do not raise.
    """
    try:
        path = Path(written).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        shown = str(written) if len(str(written)) <= 200 else f"{str(written)[:197]}..."
        raise UserError(f"no path that can be used: {reason}", place=place or shown) from None
    return path


def output_file(written: str, setting: str, data_path: str | None) -> Path:
    """The file that results go to; `setting` names it, as `--output`.

    Raises UserError, having left nothing behind, where it cannot be written, and where it is the data that is read.
    """
    output = user_path(written, setting)
    if output.is_dir() or not output.parent.is_dir():
        what = "it is a folder" if output.is_dir() else "there is no such folder"
        raise UserError(what, place=f"{setting} {written}", cure="name a file in a folder that exists")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise UserError("cannot be written", place=f"{setting} {written}")
    data = user_path(data_path) if data_path else None
    if data is not None and output.exists() and data.exists() and output.samefile(data):
        raise UserError("it is the data that is read", place=f"{setting} {written}", cure="name another file")
    return output


DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE})
"""Errors that are the disk's, and nobody's bug."""
_OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers name an error of the system: in the text of exceptions of their own."""


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's own entries (names made, renamed, removed in it), to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def free_bytes(folder: Path) -> int:
    """What may still be written where `folder` is, or will be. A quota is not known here: writing may fail earlier."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def check_free(folder: Path, needed_bytes: int, what: str, cure: str) -> None:
    """Raises UserError where less is free than `what` needs."""
    if (free := free_bytes(folder)) < needed_bytes:
        raise UserError(
            f"{what} needs {needed_bytes:,} bytes, and {free:,} are free", place=str(folder), cure=cure
        )


@contextmanager
def disk_errors_as_user_errors(
    folder: Path, what: str, needed_bytes: int | None = None, cure: str = "make room"
) -> Iterator[None]:
    """Turns a full or failing disk, met while writing `what` into `folder`, into a UserError; all else passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number not in DISK_ERRORS:
            raise
        named = getattr(error, "filename", None)
        place = folder if named is None or Path(os.fsdecode(named)).is_relative_to(folder) else named
        free = f"{free_bytes(folder):,}"
        size = f"{free} bytes" if needed_bytes is None else f"it needs {needed_bytes:,} bytes, and {free}"
        problem = f"{what} cannot be written: {os.strerror(number)}; {size} are free"
        raise UserError(problem, place=str(place), cure=cure) from error


def _error_number(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = _OF_RUST.search(str(error))
    return int(found[1]) if found else 0


def write_all(file: RawIOBase, content: bytes) -> None:
    """Write to an unbuffered file. On a disk that fills up the system takes a part first, and says so next time."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def replace_file(path: Path, content: bytes) -> None:
    """A file's new content: written beside it, flushed to the disk, renamed. Raises OSError, and the old one stays."""
    beside = hidden(path, "partial")
    try:
        with beside.open("wb", buffering=0) as file:
            write_all(file, content)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except Exception:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def hidden(path: Path, state: str) -> Path:
    """The name beside `path` for what is not, or no longer, to be found under its own."""
    return path.with_name(f".{path.name}.{state}")


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files_in(folder)}


def settle(folder: Path, hashes: Mapping[str, str]) -> None:
    """Bring a folder's files to the disk, then the folders' entries; read all back and compare.

    Raises UserError where a file is not what `hashes` says. The system is asked to forget its own copy first, so that
    what is read comes from the device; it may decline (a memory file system has no other copy), and a device may
    answer from its own cache. What is compared with is what the system took, not what was in the process's memory.
    """
    for path in files_in(folder):
        sync(path)
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        sync(inner)
    sync(folder)
    for name, expected in hashes.items():
        _forget(folder / name)
        if file_hash(folder / name) != expected:
            what = "what is read back is not what was written"
            raise UserError(what, place=str(folder / name), cure="check the disk; the last checkpoint stays")


def _forget(path: Path) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)


@contextmanager
def folder_beside(output: Path, what: str, least_bytes: int, told_bytes: int | None = None) -> Iterator[Path]:
    """A folder beside `output` to write `what` into, for `give_name`. Nothing half-written stays, however this ends.

    Raises UserError where less than `least_bytes` is free, and for a disk that fills up or fails within; `told_bytes`:
    what it then says that is needed.
    """
    folder = hidden(output.absolute(), "partial")
    delete(folder)
    check_free(output, least_bytes, what, "make room, or give an output_dir on another disk")
    with disk_errors_as_user_errors(folder, what, told_bytes):
        try:
            folder.mkdir(parents=True)
            yield folder
        finally:
            delete(folder)


def give_name(folder: Path, output: Path) -> None:
    """Settle a folder that was written beside `output`, and put it there; `output` may be an empty folder."""
    settle(folder, hashes_of(folder))
    if output.exists():
        output.rmdir()
    folder.rename(output)
    sync(output.absolute().parent)


def delete(path: Path) -> None:
    """What can be deleted of a file or a folder with all below it; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
