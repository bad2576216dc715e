"""`yeonma verify --served` asks a right server and the base alone. tests/slow/test_served.py has other wrong ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import yeonma
from tests.runs import command
from tests.served_runs import served_run, verify
from tests.servers import Server, serving
from yeonma.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "errors", run) as started:
        yield started


def test_right_server_is_well_by_address_with_and_without_v1(run: Path, server: Server) -> None:
    for url in (server.url, server.url.removesuffix("/v1"), server.url + "/"):
        status, causes, found = verify(run, url)
        assert (status, causes) == (0, [])
        assert [found[f"served {name}"] for name in ("prompts", "weights", "answers")] == ["well"] * 3


def test_mistakes_have_a_place_and_a_cure(run: Path, server: Server, tmp_path: Path) -> None:
    out = str(run)
    for words, told in (
        (["--served", "127.0.0.1:8000"], "give an address such as http://127.0.0.1:8000"),
        (["--served", "http://127.0.0.1:9"], "start the server, or give another address"),
        (["--served", server.url.removesuffix("/v1") + "/x"], "give another address"),
        (["--served", server.url, "--model", "hafl"], 'the server has no model "hafl"'),
        (["--served", server.url, "--base_model", out], "it is for the check of the folder"),
        (["--served", server.url, "--data_path", out], "it is for the check of the folder"),
        (["--model", "run"], "it names a model of a server"),
    ):
        done = command(run, "verify", out, *words)
        assert done.status == 2
        assert told in done.err
    old = shutil.copytree(run, tmp_path / "old")
    (old / "sample_answers.json").unlink()
    words = ["verify", str(old), "--served", server.url, "--model", "run"]
    done = command(old, *words)
    assert (done.status, "sample_answers.json" in done.err) == (2, True)
    (old / "sample_answers.json").write_text('{"answers": [{}]}')
    assert command(old, *words).status == 2


def test_base_is_named_and_asked_for_by_its_name(run: Path, server: Server) -> None:
    status, causes, found = verify(run, server.url, "--model", "base")
    assert (status, causes) == (1, ["adapter_not_applied"])
    assert found["served prompts"] == "well"


def test_python_refuses_settings_that_the_other_check_reads(run: Path) -> None:
    for keywords, told in (
        ({"served": "http://127.0.0.1:9", "data_path": "rows.jsonl"}, "it is for the check of the folder"),
        ({"model": "run"}, "it names a model of a server"),
    ):
        with pytest.raises(UserError, match=told):
            yeonma.verify(run, **keywords)
