"""Names of layers by regular expressions of others, which are matched in a child process with bounds.

Python's `re` may take longer than the universe is old for a short expression, and nothing in the process can stop it.
What is no more than a name is matched here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from yeonma.bounded import expressions
from yeonma.errors import UserError, brief
from yeonma.messages import tr

BOUNDS = replace(expressions.EXPRESSION, seconds=2)
MAX_LENGTH = 2_000
"""Characters of one expression."""
CURE = tr("name the layers instead, or save the adapter again with their names")
_NAME = re.compile(r"(?:\.\*)?(?:\\\.|[\w.-])+")
"""A name, perhaps with escaped dots, perhaps after anything at all: matching it takes no time."""


def is_name(pattern: str) -> bool:
    """Whether an expression is no more than a name."""
    return len(pattern) <= MAX_LENGTH and _NAME.fullmatch(pattern) is not None


def names_of(patterns: Sequence[str], names: Sequence[str], place: str) -> list[set[str]]:
    """For each expression the names that it matches from beginning to end.

    Raises UserError at `place` for an expression that is none, is very long, or exceeds its bounds.
    """
    found = []
    for pattern in patterns:
        if len(pattern) > MAX_LENGTH:
            what = tr(
                "the expression {pattern} has {pattern2:,} characters",
                pattern=brief(pattern),
                pattern2=len(pattern),
            )
            raise UserError(what, place=place, cure=CURE)
        if is_name(pattern):
            matched = [re.fullmatch(pattern, name) is not None for name in names]
        else:
            matched = expressions.bounded_match(pattern, names, place=place, cure=CURE, bounds=BOUNDS)
        found.append({name for name, matches in zip(names, matched, strict=True) if matches})
    return found
