"""The Hugging Face hub: whether it answers, and what of it lies on this machine.

Its clients ask an unreachable hub for up to a minute before they look into their caches. So it is asked here first, for
at most two seconds, and they are put offline where it does not answer.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yeonma.errors import UserError, first_line, system_reason
from yeonma.messages import later, tr
from yeonma.streams import log_line

Kind = Literal["model", "dataset"]
SECONDS = 2.0
_TIME_OUT = "HF_HUB_ETAG_TIMEOUT"
"""The environment variable of the hub's client for how long an answer may take; it holds here, too."""
_REMEMBERED_SECONDS = 20.0
_MOST_COPIES = 10
_NOT_HERE: dict[Kind, str] = {
    "model": later("no such folder, and the hub cannot be reached ({failure})"),
    "dataset": later("no such file or folder, and the hub cannot be reached ({failure})"),
}
_FROM_CACHE: dict[Kind, str] = {
    "model": later(
        "the hub cannot be reached ({failure}); taking the model {name} that was downloaded before"
    ),
    "dataset": later(
        "the hub cannot be reached ({failure}); taking the data set {name} that was downloaded before"
    ),
}


@dataclass
class _State:
    """What this process knows of the hub."""

    failure: str = ""
    asked_at: float = float("-inf")
    is_put_offline: bool = False
    """Whether the hub's clients are offline because of an answer that failed here, and not by the user's setting."""
    said: frozenset[str] = frozenset()


_state = _State()


def hub_failure(seconds: float | None = None) -> str:
    """Why the hub does not answer; empty if it does.

    `seconds`: how long it may take, by default 2, or $HF_HUB_ETAG_TIMEOUT. Uses a thread: no time-out of a request
    covers resolving names.
    """
    limit = _seconds() if seconds is None else seconds
    failures: list[str] = []

    def request() -> None:
        try:
            from huggingface_hub import constants, get_session

            status = get_session().head(constants.ENDPOINT, timeout=limit, follow_redirects=False).status_code
            failures.append(tr("status {status}", status=status) if status >= 500 else "")
        except Exception as error:  # the client may raise anything
            failures.append(_reason(error))

    thread = threading.Thread(target=request, name="hub", daemon=True)
    thread.start()
    thread.join(limit)
    if not failures:
        return tr(
            "no answer in {limit:g} seconds; {time_out}=30 in the environment waits longer",
            limit=limit,
            time_out=_TIME_OUT,
        )
    return failures[0]


def _reason(error: Exception) -> str:
    """What kept a client from connecting: the system's own error where it was one, which clients wrap."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return tr("its name cannot be resolved")
        if isinstance(cause, OSError) and cause.errno is not None:
            return system_reason(cause)
        cause = cause.__cause__ or cause.__context__
    return first_line(error) or type(error).__name__


def why_unreachable() -> str | None:
    """Why the hub cannot be asked; None if it can. Puts the hub's clients offline and, once it answers, online."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _state.is_put_offline:
        return tr("HF_HUB_OFFLINE is set")
    if time.monotonic() - _state.asked_at > _REMEMBERED_SECONDS:
        _put_offline(False)
        _state.failure = hub_failure()
        _state.asked_at = time.monotonic()
        _put_offline(bool(_state.failure))
    return _state.failure or None


def check_reachable(
    name: str, kind: Kind, revision: str | None = None, *, place: str = "", other_copies: Sequence[str] = ()
) -> None:
    """Checks a name that is no local path before a client of the hub is asked for it.

    Where the hub does not answer, what was downloaded before is taken, and this is said; the clients are offline from
    then on, until the hub answers. Raises UserError, after at most two seconds, if nothing of this name lies in the
    caches. `place`: what the user wrote, if it is more than the name. `other_copies`: names that are found on this
    machine in another way, to be listed as well.
    """
    failure = why_unreachable()
    if failure is None:
        return
    if not is_downloaded(name, kind, revision):
        copies = sorted({*downloaded(kind), *other_copies})[:_MOST_COPIES]
        cure = tr("give a path of this machine; nothing was downloaded before")
        if copies:
            cure = tr(
                "give a path of this machine, or what was downloaded before: {copies}",
                copies=", ".join(copies),
            )
        raise UserError(tr(_NOT_HERE[kind], failure=failure), place=place or name, cure=cure)
    if _state.is_put_offline:
        say_once(tr(_FROM_CACHE[kind], failure=failure, name=name))


def say_once(line: str) -> None:
    """Logs a line, once in a process and once in a run of several processes."""
    if line not in _state.said and os.environ.get("RANK", "0") == "0":
        log_line(line)
    _state.said |= {line}


def is_downloaded(name: str, kind: Kind, revision: str | None = None) -> bool:
    """Whether something of this name lies in the caches of the hub's clients."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    try:
        if kind == "dataset":
            return folder.is_dir() or (_data_cache() / name.replace("/", "___")).is_dir()
        return _has_config(folder, revision)
    except (OSError, ValueError):  # no name that a folder can have
        return False


def downloaded(kind: Kind) -> list[str]:
    """Names of what lies in the caches of the hub's clients, sorted."""
    from huggingface_hub import constants

    start = f"{kind}s--"
    folders = sorted(Path(constants.HF_HUB_CACHE).glob(f"{start}*"))
    names = {folder.name.removeprefix(start).replace("--", "/") for folder in folders}
    if kind == "model":
        names = {name for name in names if is_downloaded(name, kind)}
    else:
        names |= {folder.name.replace("___", "/") for folder in sorted(_data_cache().glob("*___*"))}
    return sorted(names)


def _has_config(folder: Path, revision: str | None) -> bool:
    """Whether the folder of a model holds a config of this revision: a branch, a tag or a commit."""
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text("utf-8").strip() if reference.is_file() else revision
    return bool(commit) and (folder / "snapshots" / str(commit) / "config.json").is_file()


def _data_cache() -> Path:
    """Where the library `datasets` keeps what it made of downloads."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")


def _put_offline(offline: bool) -> None:
    """Also for processes that this one starts, and for `datasets`, which reads the variable when it is imported."""
    from huggingface_hub import constants

    if offline == _state.is_put_offline:
        return
    _state.is_put_offline = constants.HF_HUB_OFFLINE = offline
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    else:
        os.environ.pop("HF_HUB_OFFLINE", None)
    if (config := sys.modules.get("datasets.config")) is not None:
        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = offline  # type: ignore[attr-defined]


def _seconds() -> float:
    try:
        return max(float(os.environ[_TIME_OUT]), 0.1)
    except (KeyError, ValueError):
        return SECONDS
