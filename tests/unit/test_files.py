"""Paths given by users: an invalid one is reported, wherever it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from yeonma.adapter.adapter_folder import read_adapter_folder
from yeonma.data.rows import open_rows
from yeonma.errors import UserError
from yeonma.files import user_path
from yeonma.model.source import find_base
from yeonma.shown import one_line

INVALID = {
    "a" * 5000: "File name too long",
    "b/" + "a" * 5000: "File name too long",
    "~nobody-of-this-name/x": "home directory",
    "a\0b": "null",
}


@pytest.mark.parametrize("written", INVALID)
def test_invalid_path_is_reported_with_the_path(written: str) -> None:
    for function in (user_path, find_base, read_adapter_folder, open_rows):
        with pytest.raises(UserError, match=INVALID[written]) as caught:
            function(written)
        assert str(caught.value).startswith(one_line(written[:100]))
        assert len(str(caught.value)) < 300


def test_symlink_loop_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="output_dir: invalid path: Too many levels"):
        user_path(tmp_path / "a", "output_dir")


def test_path_may_be_missing_and_may_start_with_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert user_path("~/new/deep") == tmp_path / "new" / "deep"
    assert user_path(f"{tmp_path}/file/below") == tmp_path / "file" / "below"
