"""A path as a user writes it, which may be one that no file can have."""

from __future__ import annotations

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
