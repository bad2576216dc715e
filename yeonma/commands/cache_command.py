"""`yeonma cache`: what Yeonma keeps on disk for later commands, and deleting what is no longer needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len, set_cell_size

from yeonma.commands.cache_entries import KINDS, MODELS, CacheEntry, delete_entry, read_cache
from yeonma.config.settings import CacheSettings
from yeonma.errors import Problem, UserError, system_reason
from yeonma.files import default_cache_dir, user_path
from yeonma.messages import tr
from yeonma.shown import size_text
from yeonma.streams import say

SECONDS = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


def run(settings: CacheSettings) -> int:
    """Lists the cache, or deletes entries of it.

    Raises UserError for a folder that cannot be read, for entries that cannot be deleted, and for `list` with --yes.
    """
    _check_settings(settings)
    folder = user_path(settings.cache_dir) if settings.cache_dir is not None else default_cache_dir()
    oldest = _seconds(settings.older_than) if settings.older_than is not None else 0.0
    try:
        content = read_cache(folder)
    except OSError as error:
        problem = tr("the cache cannot be read: {reason}", reason=system_reason(error))
        raise UserError(
            problem, place=str(folder), cure=tr("name another folder with --cache_dir")
        ) from error
    chosen = [
        entry
        for entry in content.entries
        if entry.age_seconds >= oldest
        and (entry.kind == settings.kind or (settings.kind == "all" and not _is_kept(entry, settings)))
    ]
    if settings.action == "list":
        say(f"{folder}: {size_text(sum(entry.size for entry in content.entries))}")
        if chosen:
            _say_table(chosen)
        if content.other_bytes:
            say(
                tr(
                    "Files that are not Yeonma's take {other_bytes} there; they are left alone.",
                    other_bytes=size_text(content.other_bytes),
                )
            )
        say(tr("Models and data sets of the hub lie in a cache of their own: `hf cache ls` lists it."))
        return 0
    if not chosen:
        say(tr("{folder}: there is nothing to delete", folder=folder))
        return 0
    if not settings.yes:
        say(tr("These would be deleted in {folder}; --yes true deletes them:", folder=folder))
        _say_table(chosen)
        return 0
    return _delete(chosen, folder)


def _check_settings(settings: CacheSettings) -> None:
    if settings.action == "list" and settings.yes:
        cure = tr("write: yeonma cache clean --yes true")
        raise UserError(tr("`yeonma cache list` deletes nothing"), place="--yes", cure=cure)


def _is_kept(entry: CacheEntry, settings: CacheSettings) -> bool:
    """Whether `clean` without a kind leaves the entry: adapters name their base by its folder."""
    return settings.action == "clean" and entry.kind == MODELS


def _seconds(text: str) -> float:
    """The seconds that `30d` stands for. Raises UserError."""
    if (match := re.fullmatch(r"([0-9]{1,6})([hdw])", text)) is None:
        cure = tr("give hours, days or weeks, such as 12h, 30d or 8w")
        raise UserError(tr('"{text}" is no time', text=text), place="--older_than", cure=cure)
    return float(match[1]) * SECONDS[match[2]]


def _say_table(entries: Sequence[CacheEntry]) -> None:
    """Number, size and last use of the entries by kind."""
    rows = [(tr("kind"), tr("entries"), tr("size"), tr("last used (days ago)"), "")]
    for kind, (meaning, _) in KINDS.items():
        of_kind = [entry for entry in entries if entry.kind == kind]
        if of_kind:
            days = [int(entry.age_seconds // SECONDS["d"]) for entry in of_kind]
            when = (
                f"{min(days)}"
                if min(days) == max(days)
                else tr("{first} to {last}", first=min(days), last=max(days))
            )
            size = size_text(sum(entry.size for entry in of_kind))
            rows.append((kind, f"{len(of_kind):,}", size, when, meaning))
    first, *widths = (max(map(cell_len, column)) for column in list(zip(*rows, strict=True))[:4])
    for kind, *numbers, meaning in rows:
        columns = (" " * (width - cell_len(text)) + text for text, width in zip(numbers, widths, strict=True))
        say("  ".join([set_cell_size(kind, first), *columns, meaning]).rstrip())


def _delete(entries: Sequence[CacheEntry], folder: Path) -> int:
    freed, in_use = 0, 0
    problems: list[Problem] = []
    for entry in entries:
        try:
            if delete_entry(entry):
                freed += entry.size
            else:
                in_use += 1
        except OSError as error:
            problems.append(
                Problem(tr("cannot be deleted: {reason}", reason=system_reason(error)), str(entry.path))
            )
    say(tr("{folder}: {size} deleted", folder=folder, size=size_text(freed)))
    if in_use:
        say(tr("Entries that running commands use were left: {in_use:,}", in_use=in_use))
    if problems:
        raise UserError(problems)
    return 0
