"""A run writes no pickles, alone or inside other files, and unpickles nothing."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from safetensors import safe_open

from tests.faults.tracing import Workshop
from tests.pairs import PLAIN, pairs
from tests.runs import SETTINGS as RUN_SETTINGS
from tests.runs import TWO_EPOCHS, arguments, articles, left_behind, model_folder, write_jsonl

VERBS: dict[str, dict[str, object]] = {
    "sft": {**RUN_SETTINGS, **TWO_EPOCHS},
    "dpo": {**PLAIN, **TWO_EPOCHS},
}


class Runs:
    """A run of a verb twice: uninterrupted, and killed in its fourth step and resumed."""

    def __init__(self, saver: Workshop, place: Path, verb: str) -> None:
        self.saver, self.place = saver, place
        data = write_jsonl(place / "rows.jsonl", articles(23) if verb == "sft" else pairs(23))
        paths = {"base_model": model_folder(place / "model"), "data_path": data, "output_dir": place / "out"}
        self.job: dict[str, Any] = {
            "command": [verb, *arguments({**paths, **VERBS[verb]})],
            "environment": {"YEONMA_CACHE": str(place / "cache")},
            "log": str(place / "log"),
            "without_pickle": True,
        }
        self.output = place / "out"
        self.run()
        self.whole = left_behind(self.output)
        shutil.rmtree(self.output)
        killed = saver.take({**self.job, "before_step": [4, "pause"]})["process"]
        saver.go_on("paused")
        os.kill(killed, 9)
        saver.hear("ended")
        self.run()

    def run(self) -> None:
        outcome = self.saver.do(self.job)
        assert outcome.status == 0, (self.place / "log").read_text()

    @property
    def files(self) -> list[Path]:
        """All files that it has written, including the token cache and the reference's log-probabilities."""
        return [
            path for name in ("out", "cache") for path in (self.place / name).rglob("*") if path.is_file()
        ]


@pytest.fixture(scope="module", params=VERBS)
def runs(saver: Workshop, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    return Runs(saver, tmp_path_factory.mktemp(request.param), request.param)


def test_a_run_goes_on_where_nothing_can_be_pickled_or_unpickled(runs: Runs) -> None:
    assert "continuing after step 3 of 10" in (runs.place / "log").read_text()
    assert left_behind(runs.output) == runs.whole


def as_safetensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (it has no other way)


def as_json(path: Path) -> None:
    json.loads(path.read_text("utf-8"))


def as_json_lines(path: Path) -> None:
    for line in path.read_text("utf-8").splitlines():
        json.loads(line)


def as_text(path: Path) -> None:
    path.read_text("utf-8")


def as_yaml(path: Path) -> None:
    yaml.safe_load(path.read_text("utf-8"))


def as_picture(path: Path) -> None:
    assert ElementTree.fromstring(path.read_text("utf-8")).tag == "{http://www.w3.org/2000/svg}svg"


def as_array(path: Path) -> None:
    """Numbers of one type, as many as the store's own list says; tokens/store.py maps them into memory."""
    assert (path.parent / "meta.json").is_file()
    assert path.read_bytes()[:6] != b"\x93NUMPY"


def as_nothing(path: Path) -> None:
    assert path.read_bytes() == b""


READERS: dict[str, Callable[[Path], None]] = {
    ".safetensors": as_safetensors,
    ".reference": as_safetensors,
    ".json": as_json,
    ".jsonl": as_json_lines,
    ".yaml": as_yaml,
    ".txt": as_text,
    ".md": as_text,
    ".jinja": as_text,
    ".svg": as_picture,
    ".bin": as_array,
    ".lock": as_nothing,
}


def test_every_file_is_what_its_name_says(runs: Runs) -> None:
    suffixes = {path.suffix for path in runs.files}
    assert {".safetensors", ".json", ".jsonl", ".bin"} <= suffixes
    for path in runs.files:
        READERS[path.suffix](path)


def is_pickle(path: Path) -> bool:
    """Whether it could be one: by its operations, which are read and not run, or as an archive, which torch writes."""
    if zipfile.is_zipfile(path):
        return True
    content = path.read_bytes()
    try:
        *_, (_, _, end) = pickletools.genops(content)
    except Exception:
        return False
    # numbers and texts may by chance begin as a pickle without a mark does, and so end early
    return content.startswith(b"\x80") or end == len(content) - 1


def test_no_file_is_a_pickle(runs: Runs) -> None:
    assert len(runs.files) > 50
    assert [path for path in runs.files if is_pickle(path)] == []


def test_pickles_are_found(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / str(protocol)).write_bytes(pickle.dumps({"a": [1.5, "b"]}, protocol))
        assert is_pickle(tmp_path / str(protocol))
    for zipped in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "weights", _use_new_zipfile_serialization=zipped)
        assert is_pickle(tmp_path / "weights")


def test_a_run_that_unpickles_would_be_found(saver: Workshop, tmp_path: Path) -> None:
    for name in ("unpickle", "torch_load"):
        outcome = saver.do({"output": str(tmp_path), "calls": [[name]]})
        assert "AssertionError: something was pickled or unpickled" in outcome.bug
