"""Which names of this machine may stand in a text, and home directories where other paths do not matter."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path

import pytest

from yeonma.export.private_paths import homes_in, is_telling, names_of_this_machine


@pytest.mark.parametrize("name", ["minsu", "m.kim", "김민수", "수진", "DESKTOP-7Q2", "4f2a8c91d0be"])
def test_names_of_people_and_of_their_machines_are_telling(name: str) -> None:
    assert is_telling(name)


@pytest.mark.parametrize("name", ["root", "Ubuntu", "user", "will", "model", "localhost", "ab", "1000", ""])
def test_ordinary_words_accounts_and_numbers_are_not_telling(name: str) -> None:
    assert not is_telling(name)


def test_user_home_and_host_give_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "minsu")
    monkeypatch.setattr(Path, "home", lambda: Path("/nfs/people/kim.minsu"))
    monkeypatch.setattr(socket, "gethostname", lambda: "box17.lab.example.org")
    assert names_of_this_machine() == {"minsu", "kim.minsu", "box17", "box17.lab.example.org"}


def test_a_user_without_an_entry_in_the_system_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", missing)
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert names_of_this_machine() == frozenset()


def test_homes_are_those_of_telling_users_or_of_the_named_ones() -> None:
    text = "/home/user/x, /home/minsu/x, C:\\Users\\hana\\x, /data/a/b"
    assert [path for _, path in homes_in(text)] == ["/home/minsu", "C:\\Users\\hana"]
    assert [path for _, path in homes_in(text, ["hana"])] == ["C:\\Users\\hana"]
