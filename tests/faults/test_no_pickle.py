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
    """Runs a command twice: uninterrupted, and killed in its fourth step and resumed."""

    def __init__(self, saver: Workshop, folder: Path, verb: str) -> None:
        self.saver, self.folder = saver, folder
        data = write_jsonl(folder / "rows.jsonl", articles(23) if verb == "sft" else pairs(23))
        paths = {
            "base_model": model_folder(folder / "model"),
            "data_path": data,
            "output_dir": folder / "out",
        }
        self.job: dict[str, Any] = {
            "command": [verb, *arguments({**paths, **VERBS[verb]})],
            "environment": {"YEONMA_CACHE": str(folder / "cache")},
            "log": str(folder / "log"),
            "without_pickle": True,
        }
        self.output = folder / "out"
        self.run()
        self.uninterrupted = left_behind(self.output)
        shutil.rmtree(self.output)
        process_id = saver.take({**self.job, "before_step": [4, "pause"]})["process"]
        saver.go_on("paused")
        os.kill(process_id, 9)
        saver.hear("ended")
        self.run()

    def run(self) -> None:
        outcome = self.saver.do(self.job)
        assert outcome.status == 0, (self.folder / "log").read_text()

    @property
    def files(self) -> list[Path]:
        """All files that the runs have written, including the token cache and the reference's log-probabilities."""
        return [
            path for name in ("out", "cache") for path in (self.folder / name).rglob("*") if path.is_file()
        ]


@pytest.fixture(scope="module", params=["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def runs(saver: Workshop, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    return Runs(saver, tmp_path_factory.mktemp(request.param), request.param)


def test_run_resumes_when_pickling_and_unpickling_raise(runs: Runs) -> None:
    assert "continuing after step 3 of 10" in (runs.folder / "log").read_text()
    assert left_behind(runs.output) == runs.uninterrupted


def read_safetensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (it has no other way)


def read_json(path: Path) -> None:
    json.loads(path.read_text("utf-8"))


def read_json_lines(path: Path) -> None:
    for line in path.read_text("utf-8").splitlines():
        json.loads(line)


def read_text(path: Path) -> None:
    path.read_text("utf-8")


def read_yaml(path: Path) -> None:
    yaml.safe_load(path.read_text("utf-8"))


def read_svg(path: Path) -> None:
    assert ElementTree.fromstring(path.read_text("utf-8")).tag == "{http://www.w3.org/2000/svg}svg"


def read_array(path: Path) -> None:
    """Raw numbers, described by the meta.json of the token store; tokens/store.py maps them into memory."""
    assert (path.parent / "meta.json").is_file()
    assert path.read_bytes()[:6] != b"\x93NUMPY"


def read_empty(path: Path) -> None:
    assert path.read_bytes() == b""


READERS: dict[str, Callable[[Path], None]] = {
    ".safetensors": read_safetensors,
    ".reference": read_safetensors,
    ".json": read_json,
    ".forecast": read_json,
    ".general": read_json,
    ".jsonl": read_json_lines,
    ".yaml": read_yaml,
    ".txt": read_text,
    ".md": read_text,
    ".jinja": read_text,
    ".svg": read_svg,
    ".bin": read_array,
    ".lock": read_empty,
    ".tokenizer": read_text,
    ".weights": read_json,
}


def test_every_file_has_the_format_of_its_suffix(runs: Runs) -> None:
    suffixes = {path.suffix for path in runs.files}
    assert {".safetensors", ".json", ".jsonl", ".bin"} <= suffixes
    for path in runs.files:
        READERS[path.suffix](path)


def is_pickle(path: Path) -> bool:
    """Whether the file may be a pickle: a zip archive, as torch writes, or pickle operations. They are not run."""
    if zipfile.is_zipfile(path):
        return True
    content = path.read_bytes()
    try:
        *_, (_, _, end) = pickletools.genops(content)
    except Exception:
        return False
    # other content may by chance start like a pickle without a header, but its operations then end early
    return content.startswith(b"\x80") or end == len(content) - 1


def test_no_file_is_a_pickle(runs: Runs) -> None:
    assert len(runs.files) > 50
    assert [path for path in runs.files if is_pickle(path)] == []


def test_is_pickle_detects_every_protocol_and_torch_files(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / str(protocol)).write_bytes(pickle.dumps({"a": [1.5, "b"]}, protocol))
        assert is_pickle(tmp_path / str(protocol))
    for zipped in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "weights", _use_new_zipfile_serialization=zipped)
        assert is_pickle(tmp_path / "weights")


def test_unpickling_in_a_run_raises_an_error(saver: Workshop, tmp_path: Path) -> None:
    for name in ("unpickle", "torch_load"):
        outcome = saver.do({"output": str(tmp_path), "calls": [[name]]})
        assert "AssertionError: something was pickled or unpickled" in outcome.bug
