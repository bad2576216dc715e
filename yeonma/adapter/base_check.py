"""Whether a base model has the content of the one that an adapter was trained on, whatever its name and place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from yeonma.adapter.adapter_folder import BASE_FOLDER, MANIFEST, AdapterFolder, read_adapter_folder
from yeonma.errors import Log, UserError
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.model.base_content import (
    BaseContent,
    changes,
    config_changes,
    config_hash_in,
    config_values,
    is_here,
    listed,
    read_content,
)
from yeonma.model.source import BaseSource


def check_content(
    adapter: AdapterFolder,
    source: BaseSource,
    *,
    config: Any = None,
    log: Log = lambda _: None,
    download: bool = True,
) -> None:
    """Raises UserError, with what differs, if the base has other weights, another config or other end tokens than in
    training. Does nothing for a merged model, and for folders of earlier versions, which do not know the content.

    `download` False leaves weights alone that are on the hub and not on this machine. Others as `read_content`.
    """
    content = adapter.base_content
    if content is None or adapter.is_whole or not (download or is_here(source)):
        return
    if found := changes(content, read_content(source, config, log=log)):
        raise another_base(adapter, source.name, found)


def check_continued_content(path: str, source: BaseSource, content: BaseContent) -> None:
    """As `check_content` for the folder of an adapter to continue, on a base with this content. Adapters that PEFT
    alone saved do not know the content."""
    adapter = _read(path)
    if adapter is None or adapter.base_content is None:
        return
    if found := changes(adapter.base_content, content):
        raise another_base(adapter, source.name, found, is_continued=True)


def check_continued_config(path: str, source: BaseSource, config: Any) -> None:
    """The part of `check_continued_content` that needs no weights."""
    adapter = _read(path)
    if adapter is None or adapter.base_content is None:
        return
    if found := config_changes(adapter.base_content, config_values(config), config_hash_in(source)):
        raise another_base(adapter, source.name, found, is_continued=True)


def _read(path: str) -> AdapterFolder | None:
    return read_adapter_folder(path) if (user_path(path) / MANIFEST).is_file() else None


def another_base(
    adapter: AdapterFolder, name: str, found: list[str], *, is_continued: bool = False
) -> UserError:
    """The error for a base that differs in what `found` says. `is_continued`: whether training goes on from the
    adapter, for which a base is always named."""
    trained, place = adapter.base, str(adapter.path)
    give = tr("give the model that it was trained on with --base_model")
    is_folder, is_there = Path(trained.name).is_absolute(), Path(trained.name).is_dir()
    if name != trained.name and os.path.realpath(name) != os.path.realpath(trained.name):
        what = tr(
            "it was trained on {trained}, which is not {name}: {found}",
            trained=trained.name,
            name=name,
            found=listed(found),
        )
        if is_there or not is_folder:
            revision = f" --model_revision {trained.revision}" if trained.revision and not is_folder else ""
            give = (
                tr("use --base_model {trained}{revision}", trained=trained.name, revision=revision)
                if is_continued
                else tr("leave --base_model out")
            )
        return UserError(what, place=place, cure=give)
    now, then = os.path.realpath(trained.name), adapter.details.get(BASE_FOLDER)
    what = tr(
        "its base model {trained} is no longer what it was trained on: {found}",
        trained=trained.name,
        found=listed(found),
    )
    if is_folder and now != trained.name:
        values = {"trained": trained.name, "now": now, "found": listed(found)}
        what = tr("it was trained on {trained}, which points to {now} now: {found}", **values)
        if then and then != now:
            what = tr(
                "it was trained on {trained}, which points to {now} now: {found}; it pointed to {then}",
                then=then,
                **values,
            )
    if then and then != now and Path(then).is_dir():
        return UserError(what, place=place, cure=tr("use --base_model {then}", then=then))
    return UserError(
        what,
        place=place,
        cure=tr("restore its files, or give the model that it was trained on with --base_model"),
    )
