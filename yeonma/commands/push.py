"""`yeonma push`: uploads an adapter folder or a merged model to the hub, without what should stay private."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from yeonma.config.settings import PushSettings
from yeonma.errors import UserError
from yeonma.export.hub_push import Upload, collect, upload
from yeonma.export.private_paths import names_of_this_machine
from yeonma.files import user_path
from yeonma.messages import counted, tr
from yeonma.shown import size_text
from yeonma.streams import say

MOST_NAMED = 50
"""How many files that stay here are named."""


@dataclass(frozen=True)
class PushedFiles:
    """What was to be sent, and the address of its commit; None if nothing was sent."""

    folder: Path
    repo: str
    files: tuple[str, ...]
    url: str | None


def run(settings: PushSettings) -> int:
    """Returns 1 if the answer to the question whether to send the files is no. Raises UserError as `push`."""
    return 0 if push(settings).url is not None or settings.dry_run else 1


def push(settings: PushSettings) -> PushedFiles:
    """Lists what will be sent, asks, sends it in one commit and compares what arrived.

    Raises UserError as `collect`, before anything is sent, and as `upload`.
    """
    folder = user_path(settings.folder)
    uploads = collect(
        folder, settings.base_model, settings.hide_paths, os.environ, _telling_names(settings.repo)
    )
    _print_uploads(folder, uploads, settings.repo, settings.public)
    pushed = PushedFiles(folder, settings.repo, tuple(file.name for file in uploads), None)
    if settings.dry_run:
        say(tr("nothing was sent (dry_run)"))
        return pushed
    if not settings.yes and not _confirmed():
        say(tr("nothing was sent"))
        return pushed
    url = upload(settings.repo, uploads, settings.message, settings.public, say)
    say(tr("{uploads} uploaded and verified: {url}", uploads=counted(len(uploads), "file"), url=url))
    return replace(pushed, url=url)


def _telling_names(repo: str) -> list[str]:
    """The names of this machine's user and host, but not the repository's owner, which is public anyway."""
    owner = repo.partition("/")[0]
    return sorted(name for name in names_of_this_machine() if name != owner)


def _print_uploads(folder: Path, uploads: Sequence[Upload], repo: str, public: bool) -> None:
    total = sum(file.size for file in uploads)
    seen_by, files = tr("public") if public else tr("private"), counted(len(uploads), "file")
    say(f"{folder} -> {repo} ({seen_by}): {files}, {size_text(total)}")
    width = max(len(file.name) for file in uploads)
    for file in uploads:
        edited = tr("  edited for upload") if file.edited else ""
        say(f"  {file.name:{width}}  {size_text(file.size):>10}{edited}")
    names = {file.name for file in uploads}
    remaining = sorted(
        path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if path.name not in names
    )
    if remaining:
        listed = ", ".join(remaining[:MOST_NAMED])
        if len(remaining) > MOST_NAMED:
            listed = tr("{name} and {count} more", name=listed, count=len(remaining) - MOST_NAMED)
        say(tr("not sent: {names}", names=listed))


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise UserError(tr("no terminal to confirm the upload on"), place="yes", cure=tr("give --yes true"))
    try:
        return input(tr("send these files? [y/N] ")).strip().lower() in ("y", "yes")
    except EOFError:
        return False
