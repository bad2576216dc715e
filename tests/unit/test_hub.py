"""Names on the hub where the hub cannot be reached: an answer at once, with what lies in the caches."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from huggingface_hub import constants

from yeonma import hub
from yeonma.data.rows import glance, open_rows
from yeonma.errors import UserError
from yeonma.model.smollm2 import HUB_NAME
from yeonma.model.source import find_base


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hub's clients think that they are online, with empty caches; the folder of the caches."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path / "yeonma"))
    monkeypatch.setattr(hub, "_state", hub._State())
    yield tmp_path


@pytest.fixture
def unreachable(online: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's address is a port at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    return online


def put_model(cache: Path, name: str, commit: str = "c0ffee") -> None:
    folder = cache / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}", encoding="utf-8")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit, encoding="utf-8")


def message(name: str, **settings: str) -> str:
    with pytest.raises(UserError) as caught:
        find_base(name, **settings)
    return str(caught.value)


def connections_to(listener: socket.socket) -> int:
    """How many have been made, and not accepted yet."""
    listener.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


def test_fault_103_an_unknown_name_is_refused_with_the_names_of_the_copies(unreachable: Path) -> None:
    assert message("nosuch/model").endswith("; give a path of this machine; nothing was downloaded before")
    put_model(unreachable, "some/model")
    put_model(unreachable, "another/model")
    (unreachable / "hub" / "models--empty--one").mkdir()
    assert message("nosuch/model").endswith("or what was downloaded before: another/model, some/model")
    assert "nosuch/model: no such folder, and the hub cannot be reached (" in message("nosuch/model")


def test_fault_103_a_model_that_was_downloaded_is_taken_and_the_clients_go_offline(
    unreachable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_model(unreachable, "some/model")
    assert find_base("some/model").name == find_base("some/model").name == "some/model"
    assert capsys.readouterr().err.count("taking the model some/model that was downloaded before") == 1
    assert constants.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"
    assert find_base("some/model", "c0ffee").revision == "c0ffee"
    for revision in ("other", "../../another", "x" * 300, "*"):
        assert "cannot be reached" in message("some/model", revision=revision)
    assert "cannot be reached" in message("a" * 250)


def test_the_clients_are_online_again_once_the_hub_answers(
    unreachable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message("nosuch/model")
    hub._state.asked_at = float("-inf")
    monkeypatch.setattr(hub, "hub_failure", lambda: "")
    assert find_base("nosuch/model").name == "nosuch/model"  # which the hub is asked for later
    assert not constants.is_offline_mode() and "HF_HUB_OFFLINE" not in os.environ


def test_fault_103_the_demos_model_is_found_by_its_name(
    unreachable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.runs import model_folder

    assert "nothing was downloaded before" in message(HUB_NAME)
    copy = model_folder(unreachable / "yeonma" / "models" / "SmolLM2-135M-Instruct-2")
    assert find_base(HUB_NAME).name == str(copy)
    assert "rounded to about 4 bits" in capsys.readouterr().err
    assert message("nosuch/model").endswith(f"or what was downloaded before: {HUB_NAME}")
    assert "cannot be reached" in message(HUB_NAME, revision="v1")
    put_model(unreachable, HUB_NAME)
    assert find_base(HUB_NAME).name == HUB_NAME


def test_fault_103_data_is_looked_for_in_both_caches(unreachable: Path) -> None:
    with pytest.raises(UserError, match="nothing was downloaded before"):
        glance("some/data:config")
    (unreachable / "datasets" / "some___data").mkdir(parents=True)
    (unreachable / "hub" / "datasets--more--data").mkdir(parents=True)
    assert glance("some/data:config") is None and glance("more/data") is None
    with pytest.raises(UserError, match="before: more/data, some/data"):
        open_rows("other/data")


def test_fault_103_a_hub_that_never_answers_takes_two_seconds(
    online: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "HF_HUB_ETAG_TIMEOUT=30" in message("nosuch/model") or "timed out" in message("nosuch/model")
        assert connections_to(silent) == 1  # each may take the two seconds
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT")
    assert hub._seconds() == hub.SECONDS == 2


def test_the_users_own_offline_setting_holds(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "hub_failure", lambda: pytest.fail("it was asked"))
    assert "the hub cannot be reached (HF_HUB_OFFLINE is set)" in message("nosuch/model")
