"""Follows a trace to find out what a power failure could still lose, and whether anything relied on it.

Written content is safe once its file is synced; a new or changed name, once its folder is synced. A lost removal does
not count, because the next run repeats it. Names that begin with a dot belong to incomplete files, which no reader
trusts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from tests.faults.tracing import FOLDERS, OPENS, SYNCS, WRITES, Call

OPENED = re.compile(r"\d+<(?P<path>[^>]*)>")
NAMED = re.compile(r"(?:(?:AT_FDCWD|\d+)<(?P<folder>[^>]*)>, )?\"(?P<path>[^\"]*)\"")
FAILED = re.compile(r"\) *= -1 ")
CHECKPOINT = re.compile(r"checkpoint-\d+|\.checkpoint-\d+\.former")
GOING = re.compile(r"\.checkpoint-\d+\.removed")


class Unsafe:
    """Files whose content, and paths whose names, are not synced yet."""

    def __init__(self) -> None:
        self.contents: set[PurePath] = set()
        self.names: set[PurePath] = set()

    def all(self) -> set[PurePath]:
        return self.contents | self.names

    def below(self, place: PurePath) -> set[PurePath]:
        """Of a file, or of a folder and all in it."""
        return {path for path in self.all() if path.is_relative_to(place)}

    def follow(self, call: Call) -> None:
        if call.name in WRITES:
            self.contents.add(opened(call))
        elif call.name in SYNCS:
            flushed = opened(call)
            self.contents.discard(flushed)
            self.names = {path for path in self.names if path.parent != flushed}
        elif call.name in (*FOLDERS, *OPENS):
            if call.name in FOLDERS or "O_CREAT" in call.text:
                self.names.add(named(call)[0])
            if "O_TRUNC" in call.text:
                self.contents.add(named(call)[0])
        else:
            before, *after = named(call)
            for paths in (self.contents, self.names):
                moved = {path for path in paths if path.is_relative_to(before)}
                paths -= moved
                paths |= {place / path.relative_to(before) for path in moved for place in after}
            self.names |= {*after}


def opened(call: Call) -> PurePath:
    match = OPENED.match(call.text)
    assert match is not None, call
    return PurePath(match["path"])


def named(call: Call) -> list[PurePath]:
    """The full paths in a call's arguments."""
    arguments = call.text.rpartition(")")[0]
    return [
        PurePath(os.path.join(match["folder"] or "", match["path"])) for match in NAMED.finditer(arguments)
    ]


def may_be_lost(path: PurePath, output: PurePath) -> bool:
    """Whether nothing relies on a file: those of hidden names, and log.txt, which is for people."""
    return path.is_relative_to(output) and (
        path == output / "log.txt" or any(part.startswith(".") for part in path.relative_to(output).parts)
    )


def breaches(calls: Sequence[Call], output: PurePath) -> list[str]:
    """Violations of the order file, folder, rename, parent in a run's calls."""
    unsafe, problems = Unsafe(), []
    for call in calls:
        if FAILED.search(call.text):
            continue
        problems += [f"{call.name} {call.text}: {what}" for what in _relied_on(call, unsafe, output)]
        unsafe.follow(call)
    left = sorted(path for path in unsafe.all() if not may_be_lost(path, output))
    return problems + [f"{path} is not safe at the end" for path in left]


def _relied_on(call: Call, unsafe: Unsafe, output: PurePath) -> Iterator[str]:
    if call.name in (*WRITES, *SYNCS, *FOLDERS, *OPENS):
        return
    before, *after = named(call)
    new_names = {path for path in unsafe.names if CHECKPOINT.fullmatch(path.name)}
    if after and not may_be_lost(after[0], output):
        yield from (f"{path} is not safe" for path in unsafe.below(before) - ({before} & unsafe.names))
        if before in unsafe.contents:
            yield f"{before} is not safe"
    if after and (CHECKPOINT.fullmatch(after[0].name) or after[0].name == "run.json"):
        # the steps' lines up to a checkpoint; all of a finished run
        others = {path for path in unsafe.all() - unsafe.below(before) if not may_be_lost(path, output)}
        yield from (f"{path} is not safe" for path in others | new_names)
    parts = before.relative_to(output).parts if before.is_relative_to(output) else ()
    if parts and (CHECKPOINT.fullmatch(parts[0]) or GOING.fullmatch(parts[0])):
        yield from (f"the name of {path} is not safe" for path in new_names - {before})
