"""The lease with a tiny shape on the CPU, by the command of docs/benchmarks.md, and again with nothing left to do."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
SHOWN = "python -m benchmarks."


def shown_commands() -> list[list[str]]:
    """The words after `python` of the page's commands that are modules of benchmarks/, in its blocks."""
    lines = [line.removeprefix(".venv/bin/") for line in PAGE.read_text("utf-8").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(SHOWN)]


def test_commands_of_the_page_name_existing_modules_options_and_jobs() -> None:
    found = shown_commands()
    assert len(found) == 2
    for module, *words in ((words[1], *words[2:]) for words in found):
        done = subprocess.run(
            [sys.executable, "-m", module, *words, "--list"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
def test_the_tiny_lease_comes_to_its_end_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    (words,) = [words for words in shown_commands() if "--tiny" in words]
    output = Path(words[words.index("--output") + 1])
    command = [sys.executable, *words, "--work", str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    results = []
    for left in (2, 0):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{left} jobs to do" in done.stdout
        results.append(json.loads((tmp_path / output / "lease.json").read_text("utf-8")))
    assert results[0]["jobs"] == results[1]["jobs"]
    assert {entry["state"] for entry in results[0]["jobs"].values()} == {"done"}
    assert (tmp_path / "work" / "tiny" / "model" / "model.safetensors").exists()
