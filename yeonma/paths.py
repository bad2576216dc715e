"""A path as a user writes it, which may be one that no file can have, or that nothing may be written to."""

from __future__ import annotations

import os
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
