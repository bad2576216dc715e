"""The language of help: that of $YEONMA_LANG or of the terminal, if it is one of LANGUAGES."""

from __future__ import annotations

import os
from typing import Literal, get_args

Language = Literal["en", "ko"]
VARIABLES = ("YEONMA_LANG", "LC_ALL", "LC_MESSAGES", "LANG")


def language() -> Language:
    """By the first of these variables that is set: `ko_KR.UTF-8` is Korean. English for any other language."""
    named = next((value for name in VARIABLES if (value := os.environ.get(name))), "")
    code = named.replace("-", "_").partition("_")[0].partition(".")[0].lower()
    return next((known for known in get_args(Language) if known == code), "en")
