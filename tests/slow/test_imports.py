"""A second `yeonma inspect` reads tokens and forecast from the cache, and imports nothing that only models need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import articles, model_folder, write_jsonl

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
INSPECT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("peft", "bitsandbytes", "transformers.modeling_utils", "transformers.masking_utils"):
            raise AssertionError(f"{name} was imported")

if sys.argv[1] == "again":
    sys.meta_path.insert(0, Refuse())
from yeonma.cli import main
sys.exit(main(["inspect", "--base_model", "base", "--data_path", "rows.jsonl"]))
"""


def test_a_second_inspect_imports_neither_peft_nor_the_code_of_models(tmp_path: Path) -> None:
    model_folder(tmp_path / "base")
    write_jsonl(tmp_path / "rows.jsonl", articles(8))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "YEONMA_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    printed = []
    for turn in ("first", "again"):
        command = [sys.executable, "-c", INSPECT, turn]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    measured = ("verdict", "time", "speed")  # free memory, and the device's rate
    first, again = ([line for line in text.splitlines() if not line.startswith(measured)] for text in printed)
    assert "peak memory" in printed[0]
    assert again == first
