"""The folders of the studio: what lies in them is found, and no path leads out of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hostile import NAME
from tests.studios import Client, run_folder
from yeonma.errors import UserError
from yeonma.studio import roots as roots_module
from yeonma.studio.roots import Roots


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A root with one of each kind, and files beside it."""
    root = tmp_path / "root"
    run_folder(root / "runs" / "titles")
    (root / "runs" / "titles" / "checkpoint-10").mkdir()
    (root / "rows.jsonl").write_text("{}\n")
    (root / "title.txt").write_text("{document}\n{title}")
    (root / "notes.txt").write_text("nothing")
    (root / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (root / "model" / name).write_text("{}")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "rows.jsonl").write_text("{}\n")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    run_folder(tmp_path / "elsewhere")
    (root / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    return root


def test_each_kind_is_found_and_links_are_not_followed(place: Path) -> None:
    found = Roots.of([str(place)]).look()
    assert found.runs == [place / "runs" / "titles"]
    assert found.data == [place / "rows.jsonl"]
    assert found.templates == [place / "title.txt"]
    assert found.models == [place / "model"]
    assert found.is_whole


@pytest.mark.parametrize(
    "written",
    [
        "../secret.jsonl",
        "link.jsonl",
        "linked/metrics.jsonl",
        "/etc/passwd",
        "runs/../../secret.jsonl",
        "~root",
        "\0",
    ],
)
def test_no_path_leads_out_of_the_roots(place: Path, written: str) -> None:
    roots = Roots.of([str(place)])
    with pytest.raises(UserError):
        roots.resolve(written)
    assert roots.resolve("rows.jsonl") == roots.resolve(str(place / "rows.jsonl")) == place / "rows.jsonl"


def test_a_root_with_a_name_that_begins_alike_is_another(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs-private").mkdir()
    with pytest.raises(UserError, match="outside"):
        Roots.of([str(tmp_path / "runs")]).resolve(str(tmp_path / "runs-private"))


def test_a_root_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Roots.of([str(tmp_path / "missing")])


def test_a_look_ends_after_so_many_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots_module, "MOST_NAMES", 3)
    found = Roots.of([str(place)]).look()
    assert not found.is_whole
    assert "Not all folders were looked into" in Client.on(place).get("/").text


def test_only_so_many_text_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("{text}" if number % 2 else "nothing")
    monkeypatch.setattr(roots_module, "MOST_LOOKED_INTO", 3)
    found = Roots.of([str(tmp_path)]).look()
    assert found.templates == [tmp_path / "1.txt"] and not found.is_whole


def test_names_of_any_bytes_are_found(tmp_path: Path) -> None:
    run_folder(tmp_path / NAME.replace("/", "_"))
    run_folder(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")))
    client = Client.on(tmp_path)
    assert len(client.studio.found().runs) == 2
    assert client.get("/").status == 200


def test_a_run_that_became_a_link_is_gone(place: Path, tmp_path: Path) -> None:
    from yeonma.studio.found_runs import key_of

    client = Client.on(place)
    (run,) = client.studio.found().runs
    assert client.get(f"/run/{key_of(run)}").status == 200
    run.rename(tmp_path / "moved")
    run.symlink_to(tmp_path / "elsewhere")
    assert client.get(f"/run/{key_of(run)}").status == 404
