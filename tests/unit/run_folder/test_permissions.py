"""Files of an output folder have the permissions of ordinary new files, whoever writes them."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from tests.runs import articles, command, model_folder, trained, write_jsonl
from yeonma.files import files_in

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no umask")


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_of_runs_and_merged_models_follow_the_umask(mask: int, expected: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        base, data = model_folder(tmp_path / "base"), write_jsonl(tmp_path / "rows.jsonl", articles(8))
        done = trained(tmp_path / "out", base, data, save_steps=1, val_set_size=2, card_rows=1)
        merged = tmp_path / "merged"
        assert command(merged, "merge", str(done.folder), "--output_dir", str(merged)).status == 0
    finally:
        os.umask(before)
    paths = [*files_in(done.folder), *files_in(merged)]
    assert any(path.name == "optimizer.safetensors" for path in paths)
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {expected}
