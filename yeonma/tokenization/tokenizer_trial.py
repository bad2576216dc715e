"""A tokenizer.json of others, tried in a child process before it is read here."""

from __future__ import annotations

from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from yeonma.bounded.child import MIB, Bounds, OverBounds, Refused, ask, end
from yeonma.errors import UserError
from yeonma.files import default_cache_dir, file_hash, replace_file
from yeonma.messages import tr

TRIAL = 1
"""Increased whenever a tokenizer is tried otherwise."""
SECONDS, SECONDS_PER_MIB = 10.0, 1.0
MEMORY, MEMORY_PER_BYTE = 512 * MIB, 40
"""Bounds of a trial. Gemma 3's tokenizer, of 262,144 tokens in 32 MiB, takes 3 seconds and 11 bytes per byte."""
LARGEST = 256 * MIB
LARGEST_OF_OTHERS = 16 * MIB
"""Bytes of a file. The largest that are published have a third of it, or less."""
OTHERS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_CURE = tr("use the original model's files, if these are not")

_LARGE = 8 * MIB

_passed: set[str] = set()


def check_size(path: Path) -> None:
    """Raises UserError for a file that is larger than any of its name should be, or is no file."""
    if not path.is_file():
        problem = tr("it is no file, but something else (a pipe, a folder)")
        raise UserError(problem, place=str(path), cure=_CURE)
    size, most = path.stat().st_size, LARGEST_OF_OTHERS if path.name in OTHERS else LARGEST
    if size > most:
        problem = tr(
            "it has {size:,.0f} MiB; more than {most} are not read", size=size / MIB, most=most // MIB
        )
        raise UserError(problem, place=str(path), cure=_CURE)


def try_tokenizer(path: Path) -> None:
    """Reads a tokenizer.json and encodes texts with it, in a child process. A tokenizer that passes is not tried again:
    a file in the cache says so.

    Raises UserError if it takes more time, memory or tokens than any real one. What else is wrong with it the reader
    says.
    """
    check_size(path)
    key = sha256(f"{TRIAL} {version('tokenizers')} {file_hash(path)}".encode()).hexdigest()
    record = default_cache_dir() / f"{key}.tokenizer"
    if key in _passed or record.is_file():
        return
    size = path.stat().st_size
    bounds = Bounds(SECONDS + SECONDS_PER_MIB * size / MIB, MEMORY + MEMORY_PER_BYTE * size, MIB)
    try:
        what = ask("tokenizer", (str(path.resolve()),), bounds).decode()
    except Refused:
        return
    except OverBounds as error:
        what = error.args[0]
    if size > _LARGE:
        end()  # it would keep the memory
    if what:
        raise UserError(
            tr("reading it, or encoding texts of 20,000 characters with it, {what}", what=what),
            place=str(path),
            cure=_CURE,
        )
    _passed.add(key)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        replace_file(record, b"passed\n")
    except OSError:  # it is tried again next time
        pass
