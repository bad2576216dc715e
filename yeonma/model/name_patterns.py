"""Regular expressions of others, matched against names with bounds of time and memory.

Python's `re` may take longer than the universe is old for a short expression, and nothing in the process can stop it.
So what is more than a name is matched in a child process, which is killed when its time is up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from yeonma.errors import UserError, brief

SECONDS = 5.0
MAX_LENGTH = 2_000
"""Characters of one expression."""
MAX_MEMORY = 1 << 30
_NAME = re.compile(r"(?:\.\*)?(?:\\\.|[\w.-])+")
"""A name, perhaps with escaped dots, perhaps after anything at all: matching it takes no time."""

_CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
    resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
except (ImportError, ValueError, OSError):
    pass
task = json.load(sys.stdin)
found = []
for pattern in task["patterns"]:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        found.append(str(error))
        continue
    found.append([at for at, name in enumerate(task["names"]) if compiled.fullmatch(name)])
json.dump(found, sys.stdout)
"""


def is_name(pattern: str) -> bool:
    """Whether an expression is no more than a name."""
    return len(pattern) <= MAX_LENGTH and _NAME.fullmatch(pattern) is not None


def bounded_match(patterns: Sequence[str], names: Sequence[str], place: str) -> list[set[str]]:
    """For each expression the names that it matches from beginning to end.

    Raises UserError at `place` for an expression that is none, is very long, or takes longer than a few seconds.
    """
    cure = "name the layers instead, or save the adapter again with their names"
    for pattern in patterns:
        if len(pattern) > MAX_LENGTH:
            what = f"the expression {brief(pattern)} has {len(pattern):,} characters"
            raise UserError(what, place=place, cure=cure)
    found: list[list[int] | str] = []
    if all(map(is_name, patterns)):
        found = [[at for at, name in enumerate(names) if re.fullmatch(pattern, name)] for pattern in patterns]
    else:
        task = json.dumps({"patterns": list(patterns), "names": list(names)})
        code = _CHILD.format(memory=MAX_MEMORY, seconds=int(SECONDS) + 1)
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", code], input=task.encode(), capture_output=True, timeout=SECONDS
            )
            found = json.loads(done.stdout) if done.returncode == 0 else []
        except subprocess.TimeoutExpired:
            pass
    if len(found) != len(patterns):
        what = f"the expression {brief(patterns[0])} takes too long to match" + (
            f", or one of the {len(patterns) - 1} others" if len(patterns) > 1 else ""
        )
        raise UserError(what, place=place, cure=cure)
    matched = []
    for pattern, hits in zip(patterns, found, strict=True):
        if isinstance(hits, str):
            what = f"{brief(pattern)} is no regular expression ({brief(hits)})"
            raise UserError(what, place=place, cure=cure)
        matched.append({names[at] for at in hits})
    return matched
