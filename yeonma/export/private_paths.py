"""Paths of this machine, home directories, and names of its user and host, in text that is about to be published."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

HIDDEN_HOME = "~"
HIDDEN_NAME = "user"

_CHARACTERS = r"[\w.@+=%-]"
_PART = rf"{_CHARACTERS}{{1,255}}"
_BLANK_PART = rf"{_PART}(?: {_PART}){{0,7}}"
_SEPARATOR = r"(?:\\\\|[\\/])"
"""Of Windows, also escaped; in a path that begins with a drive, a slash too."""
_WINDOWS_PART = r"[^\s\"'`<>|\\/:*?]{1,255}"
_WINDOWS_BLANK_PART = rf"{_WINDOWS_PART}(?: {_WINDOWS_PART}){{0,7}}"
_OUTSIDE = r"(?<![\w.:/~<\\+-])"
"""What may not stand before a path: the path of a URL follows a letter, and base64 has `+/`."""

_HOMES = r"/(?:(?:export/|var/|usr/|data/|mnt/)?home|(?:mnt/[a-z]/|[a-z]/)?Users|mnt/[a-z]/Documents and Settings)/"
_FILE_URL = r"file://[^\s\"'`<>]{1,4000}"
_POSIX_HOME = rf"{_OUTSIDE}{_HOMES}(?:{_BLANK_PART}/)*{_PART}/?"
_WINDOWS = rf"(?<!\w)[A-Za-z]:{_SEPARATOR}(?:{_WINDOWS_BLANK_PART}{_SEPARATOR})*{_WINDOWS_PART}{_SEPARATOR}?"
_SHARE = rf"(?<![\w\\])\\\\(?:\\\\)?[\w.$-]{{1,255}}{_SEPARATOR}(?:{_WINDOWS_BLANK_PART}{_SEPARATOR})*{_WINDOWS_PART}"
# At least two parts, to exclude "/think" and "and/or".
_POSIX = rf"{_OUTSIDE}/(?:{_PART}/)+{_PART}/?"
_QUOTED = rf"(?<=[\"'`])/(?:{_BLANK_PART}/)+{_BLANK_PART}/?(?=[\"'`])"
PRIVATE_PATH = re.compile("|".join((_FILE_URL, _POSIX_HOME, _QUOTED, _WINDOWS, _SHARE, _POSIX)))
"""An absolute path of POSIX or Windows. Blanks may stand in a home directory, between quotes and in Windows' paths."""
_WHOLE_PATH = re.compile(rf"/(?:{_BLANK_PART}/)+{_BLANK_PART}/?")
_HOME = re.compile(
    rf"(?:file://[^/\s]{{0,255}})?(?:{_HOMES}|/?[A-Za-z]:{_SEPARATOR}(?:Users|Documents and Settings){_SEPARATOR})"
    rf"([^/\\\"'`<>|]{{1,255}})"
)
"""The beginning of a path in a home directory, and its user's name."""

_ACCOUNTS = """
    root user users ubuntu debian fedora centos alpine arch admin administrator guest public shared
    default owner me runner jovyan vagrant pi ec2-user azureuser gcp google colab kaggle sagemaker-user
    jupyter jupyterhub coder codespace vscode gitpod docker podman app apps web www www-data node nodejs
    git github gitlab jenkins ci build builder dev devel developer test tester testing demo example sample
    nobody daemon service services server system localhost local localdomain host hostname machine
    computer laptop desktop workstation cluster slurm gpu cpu cuda nvidia torch python conda anaconda
    miniconda venv work worker workspace project projects home data dataset datasets model models train
    trainer training eval run runs output outputs news title titles text texts base chat hub lab labs
    research student students team staff temp tmp mac macbook windows linux unix none null name names
"""
"""Accounts of images, clouds and services, and what machines are called by what they do."""
_WORDS = """
    will mark bill rose grace hope faith joy may june april august summer autumn dawn jack frank rich drew
    dean art ray grant chase hunter miles pat sue gene guy max min dick rob bob don ivy lily violet olive
    ruby pearl amber crystal melody harmony carol page paige bishop king prince duke earl baron judge
    major cook baker smith taylor mason carter cooper parker fisher turner walker butler clay stone reed
    rivers brook lane glen heath woods field hill young long short little brown green white black gray
    grey gold silver wolf fox lamb bird fish star sun moon sky storm rain snow frost winter angel
    christian jordan israel china paris london sydney austin houston dallas lee kim park day titan spark
    apollo atlas zeus thor orion phoenix lambda alpha beta gamma delta omega sigma theta pluto mars venus
"""
"""Words that are names as well."""
ORDINARY = frozenset((_ACCOUNTS + _WORDS).split())
"""Names that tell nothing about a person, or that are words which any text may hold."""
_SHORTEST_NAME = 3


def names_of_this_machine() -> frozenset[str]:
    """The names of this user, of the home directory and of this host, where they tell something."""
    names = set()
    for read in (getpass.getuser, lambda: Path.home().name, socket.gethostname):
        try:
            names.add(read())
        except (OSError, KeyError, RuntimeError, ImportError):  # a user without an entry in the system's list
            continue
    names |= {name.partition(".")[0] for name in names}
    return frozenset(name for name in names if is_telling(name))


def is_telling(name: str) -> bool:
    """Whether a user's or host's name may give somebody away, and is no ordinary word or number."""
    is_long = len(name) >= _SHORTEST_NAME or (len(name) == 2 and not name.isascii())
    return is_long and name.casefold() not in ORDINARY and not name.isdigit()


def paths_in(text: str) -> Iterator[tuple[int, str]]:
    """Yields (position, path) of every absolute path."""
    if _WHOLE_PATH.fullmatch(text):
        yield 0, text
        return
    for match in PRIVATE_PATH.finditer(text):
        yield match.start(), match.group()


def homes_in(text: str, names: Collection[str] = ()) -> Iterator[tuple[int, str]]:
    """Yields (position, path) of the home directories of telling users; with `names`, of these users only."""
    for match in _HOME.finditer(text):
        user = match[1].strip()
        if (user in names) if names else is_telling(user):
            yield match.start(), match.group()


def names_in(text: str, names: Collection[str]) -> Iterator[tuple[int, str]]:
    """Yields (position, name) wherever a name stands as a word."""
    for name in sorted(names):
        if name in text:
            for match in _word(name).finditer(text):
                yield match.start(), name


def without_private(text: str, names: Collection[str] = ()) -> str:
    """The text with every absolute path shortened to its last part, home directories and names hidden whole."""
    if _WHOLE_PATH.fullmatch(text):
        text = _last_part(text)
    else:
        text = PRIVATE_PATH.sub(lambda match: _last_part(match.group()), text)
    for name in names:
        if name in text:
            text = _word(name).sub(HIDDEN_NAME, text)
    return text


def _word(name: str) -> re.Pattern[str]:
    """The name as a word. Korean particles follow a name without a blank; `_` separates words."""
    if name.isascii():
        return re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])")
    return re.compile(rf"(?<![^\W_]){re.escape(name)}")


def _last_part(path: str) -> str:
    """The last part of a path: `~` for a home directory itself, and without the user's name if that stands in it."""
    parts = [part for part in re.split(r"[/\\]+", path) if part]
    home = _HOME.match(path)
    if home is None:
        return parts[-1]
    user = home[1].strip()
    if home.end() >= len(path.rstrip("/\\")) or parts[-1] == user:
        return HIDDEN_HOME
    return _word(user).sub(HIDDEN_NAME, parts[-1]) if is_telling(user) else parts[-1]


def replace_name(text: str, before: str, after: str) -> str:
    """Replaces a name by another where it stands as a whole."""
    whole = re.compile(rf"(?<![\w./\\-]){re.escape(before)}(?![\w/\\-]|\.\w)")
    return whole.sub(lambda _: after, text)
