"""Paths as users write them, hashes, atomic and durable writes, and disk errors as UserError."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import IO, BinaryIO

from yeonma.errors import UserError, system_reason
from yeonma.messages import later, tr

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE})
"""Errors of the disk, which are no bugs."""
_CURES = {
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV), tr("check the disk")),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), tr("let this user write there")),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), tr("let this process open more files (ulimit -n)")),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ELOOP), tr("remove what is in the way")),
    **dict.fromkeys((errno.ENOENT, errno.EBUSY), tr("leave the folder alone while it is in use")),
}
"""What helps against an error of the system other than a full disk."""
MOST_BYTES = 1 << 28
"""Of a file that is read whole: a record as JSON, never weights or data."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""Errors of a file system that cannot lock files."""
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
"""Opening a pipe then fails, or succeeds at once, instead of waiting for its other end."""
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""safetensors and tokenizers report the system's error number only in the text of their own exceptions."""


def user_path(written: str | Path, place: str = "") -> Path:
    """The path with `~` expanded. It need not exist.

    Raises UserError at `place`, or at the path itself, for an invalid path: a name that is too long, a NUL, `~` of an
    unknown user, a loop of links, a folder without access. `is_dir` and the like do not raise for the returned path.
    """
    try:
        path = Path(written).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:
        shown = str(written) if len(str(written)) <= 200 else f"{str(written)[:197]}..."
        raise UserError(
            tr("invalid path: {reason}", reason=system_reason(error)), place=place or shown
        ) from None
    return path


def default_cache_dir() -> Path:
    """$YEONMA_CACHE, or ~/.cache/yeonma."""
    return user_path(os.environ.get("YEONMA_CACHE") or "~/.cache/yeonma")


def output_file(written: str, setting: str, data_path: str | None) -> Path:
    """The file for results. `setting` is the option that names it, such as `--output`.

    Raises UserError, without creating anything, if the file cannot be written or is the data file itself.
    """
    output = user_path(written, setting)
    if output.is_dir() or not output.parent.is_dir():
        what = tr("this is a folder") if output.is_dir() else tr("no such folder")
        raise UserError(what, place=f"{setting} {written}", cure=tr("name a file in a folder that exists"))
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise UserError(tr("cannot be written"), place=f"{setting} {written}")
    data = user_path(data_path) if data_path else None
    if data is not None and output.exists() and data.exists() and output.samefile(data):
        raise UserError(
            tr("this is the data file itself"), place=f"{setting} {written}", cure=tr("name another file")
        )
    return output


def existing_folder(written: str, cure: str) -> Path:
    """The folder that a setting names. Raises UserError, with this cure, if there is none."""
    folder = user_path(written)
    if not folder.is_dir():
        raise UserError(tr("no such folder"), place=written, cure=cure)
    return folder


def new_output_folder(written: str) -> Path:
    """The folder that `output_dir` names, to be written as a whole. Raises UserError if it exists and is not empty."""
    output = user_path(written, f"output_dir {written}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        cure = tr("give another folder, or remove it")
        raise UserError(tr("it exists already"), place=f"output_dir {output}", cure=cure)
    return output


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def end_of(file: IO[bytes], most: int) -> str:
    """The last `most` bytes of a file that another process may still write into, as text."""
    size = file.seek(0, os.SEEK_END)
    return os.pread(file.fileno(), most, max(0, size - most)).decode("utf-8", "replace")


def content_key(*parts: object) -> str:
    """The SHA-256 of values that JSON holds: the key of what they decide."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files_in(folder)}


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries (names created, renamed or removed in it), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be. Quotas are not included, so that writing may fail earlier."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_free(folder: Path, needed_bytes: int, what: str, cure: str) -> None:
    """Raises UserError if less than `needed_bytes`, which `what` takes, is free."""
    if (free := free_bytes(folder)) < needed_bytes:
        raise UserError(
            tr(
                "{what} needs {needed_bytes:,} bytes, and {free:,} are free",
                what=what,
                needed_bytes=needed_bytes,
                free=free,
            ),
            place=str(folder),
            cure=cure,
        )


@contextmanager
def disk_errors_as_user_errors(
    folder: Path, what: str, needed_bytes: int | None = None, cure: str = tr("make room"), then: str = ""
) -> Iterator[None]:
    """Turns the errors of the system while `what` is written into `folder` into a UserError: a full or failing disk,
    missing permissions, too many open files, a folder that is gone. Other errors pass.

    `cure`: what helps against a full disk. `then`: what to do after any cure.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _error_number(error)
        filename = getattr(error, "filename", None)
        is_inside = filename is None or Path(os.fsdecode(filename)).is_relative_to(folder)
        is_gone = number == errno.ENOENT and filename is None  # of some other file
        if number not in DISK_ERRORS and (number not in _CURES or not is_inside or is_gone):
            raise
        place = folder if is_inside else filename
        reason = system_reason(number)
        if number not in DISK_ERRORS:
            problem = tr("{what} cannot be written: {number}", what=what, number=reason)
        elif needed_bytes is None:
            problem = tr(
                "{what} cannot be written: {reason}; {free:,} bytes are free",
                what=what,
                reason=reason,
                free=free_bytes(folder),
            )
        else:
            problem = tr(
                "{what} cannot be written: {reason}; it needs {needed:,} bytes, and {free:,} are free",
                what=what,
                reason=reason,
                needed=needed_bytes,
                free=free_bytes(folder),
            )
        cure = _CURES.get(number, cure)
        if then:
            cure = tr("{cure}, {then}", cure=cure, then=then) if cure else then
        raise UserError(problem, place=str(place), cure=cure) from error


def _error_number(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    match = _RUST_ERROR.search(str(error))
    return int(match[1]) if match else 0


def write_all(file: RawIOBase, content: bytes) -> None:
    """Writes to an unbuffered file. When a disk fills up, the first write is short and only the next one fails."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]


_KINDS = {
    stat.S_IFREG: later("file"),
    stat.S_IFDIR: later("folder"),
    stat.S_IFLNK: later("symbolic link"),
    stat.S_IFIFO: later("pipe"),
    stat.S_IFSOCK: later("socket"),
}
_DEVICE, _SPECIAL = later("device"), later("special file")


def kind_of(path: Path) -> str:
    """What lies there, by itself and not by what it points to: `file`, `folder`, `symbolic link`, `pipe`, `socket`,
    `device`; empty if nothing does. In English for code; `tr(it)` shows it."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return _KINDS.get(stat.S_IFMT(mode), _DEVICE)


def open_regular(path: str | Path, flags: int) -> int:
    """Opens a file, and nothing else: no link is followed, and a pipe does not make it wait. Returns the descriptor.

    Fits `opener` of `open`. Raises UserError for anything but a file, and OSError.
    """
    try:
        descriptor = os.open(path, flags | _NO_FOLLOW | _NO_WAIT, 0o666)
    except OSError:
        if (kind := kind_of(Path(path))) not in ("", "file"):
            raise _not_a_file(path, kind) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_file(path, kind_of(Path(path)))
    return descriptor


def read_file(path: Path) -> bytes:
    """The content of a file, also through a link, as in folders of the hub's cache. A pipe or a device is not waited
    for: OSError, as for anything else that is no file."""
    with open(os.open(path, os.O_RDONLY | _NO_WAIT), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, tr("it is not a file"), str(path))
        return _all_of(file, path)


def read_regular(path: Path) -> bytes:
    """The content of a file. Raises as `open_regular`."""
    with open(path, "rb", opener=open_regular) as file:
        return _all_of(file, path)


def _all_of(file: BinaryIO, path: Path) -> bytes:
    """What a file of a record holds. Raises OSError for gigabytes, which no record has: a sparse file has them free."""
    if os.fstat(file.fileno()).st_size > MOST_BYTES:
        raise OSError(
            errno.EFBIG, tr("it has more than {most_bytes:,} bytes", most_bytes=MOST_BYTES), str(path)
        )
    return file.read()


def _not_a_file(path: str | Path, kind: str) -> UserError:
    return UserError(
        tr("it is a {value} where a file belongs", value=tr(kind or _SPECIAL)),
        place=str(path),
        cure=tr("remove it"),
    )


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically: written beside it, flushed, renamed. On OSError the old content stays.

    Raises UserError if something other than a file, such as a link, lies beside it under the hidden name.
    """
    beside = hidden_path(path, "partial")
    if kind_of(beside) not in ("", "file"):
        raise _not_a_file(beside, kind_of(beside))
    try:
        beside.unlink(missing_ok=True)  # of a killed process, perhaps with a hard link elsewhere
        with open(beside, "xb", buffering=0, opener=open_regular) as file:
            write_all(file, content)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except Exception:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def give_usual_permissions(folder: Path) -> None:
    """Gives every file below a folder that this process has made the permissions of an ordinary new file.

    safetensors writes files that their owner alone may read. The folder itself was made under the process's umask, so
    its permissions, without the right to execute, are those of a new file.
    """
    usual = folder.stat().st_mode & 0o666
    for path in files_in(folder):
        if stat.S_IMODE(path.stat().st_mode) != usual:
            path.chmod(usual)


def hidden_path(path: Path, state: str) -> Path:
    """A hidden name beside `path`, for content that is not yet, or no longer, valid under its own name."""
    return path.with_name(f".{path.name}.{state}")


def sync_and_verify(folder: Path, hashes: Mapping[str, str]) -> None:
    """Flushes a folder's files and entries to disk, reads every file back and compares its hash.

    Raises UserError if a hash differs. The system is asked to drop its cached copy first, so that the data comes from
    the device; it may decline (a memory file system has no other copy), and a device may answer from its own cache.
    `hashes` are of what the system accepted, not of what was in the process's memory.
    """
    for path in files_in(folder):
        sync(path)
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        sync(inner)
    sync(folder)
    for name, expected in hashes.items():
        _drop_from_cache(folder / name)
        if file_hash(folder / name) != expected:
            what = tr("the file read back from the disk differs from what was written")
            raise UserError(
                what, place=str(folder / name), cure=tr("check the disk; the last checkpoint is intact")
            )


def _drop_from_cache(path: Path) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@contextmanager
def damage_as_user_error(path: Path) -> Iterator[None]:
    """Raises UserError for a record of ours that cannot be read, or whose content is of another form."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise UserError(tr("damaged ({error})", error=system_reason(error)), place=str(path)) from error


@contextmanager
def staging_folder(
    output: Path, what: str, least_bytes: int, needed_bytes: int | None = None
) -> Iterator[Path]:
    """A folder beside `output` to write `what` into; `move_into_place` then gives it its name. Deleted at the end.

    Raises UserError if less than `least_bytes` is free, or if the disk fills up or fails meanwhile; that message then
    says how many bytes are needed in all, if `needed_bytes` is known.
    """
    folder = hidden_path(output.absolute(), "partial")
    delete(folder)
    check_free(output, least_bytes, what, tr("make room, or give an output_dir on another disk"))
    with disk_errors_as_user_errors(folder, what, needed_bytes):
        try:
            folder.mkdir(parents=True)
            yield folder
        finally:
            delete(folder)


def move_into_place(folder: Path, output: Path) -> None:
    """Flushes and verifies a staging folder, and renames it to `output`, which may be an empty folder."""
    give_usual_permissions(folder)
    sync_and_verify(folder, hashes_of(folder))
    if output.exists():
        output.rmdir()
    folder.rename(output)
    sync(output.absolute().parent)


def delete(path: Path) -> None:
    """Deletes a file, or a folder with everything below it, as far as possible. Links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
