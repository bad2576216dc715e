"""The language of help: that of $YEONMA_LANG or of the terminal, if it is one of LANGUAGES."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

Language = Literal["en", "ko"]
VARIABLES = ("YEONMA_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
_SPOKEN: ContextVar[Language | None] = ContextVar("_SPOKEN", default=None)


def language() -> Language:
    """That of `speaking`; else by the first of these variables that is set: `ko_KR.UTF-8` is Korean. English for any
    other language."""
    if (spoken := _SPOKEN.get()) is not None:
        return spoken
    named = next((value for name in VARIABLES if (value := os.environ.get(name))), "")
    code = named.replace("-", "_").partition("_")[0].partition(".")[0].lower()
    return next((known for known in get_args(Language) if known == code), "en")


@contextmanager
def speaking(name: Language) -> Iterator[None]:
    """This language within the block, in this thread: English for what programs read, whatever the terminal speaks."""
    token = _SPOKEN.set(name)
    try:
        yield
    finally:
        _SPOKEN.reset(token)
