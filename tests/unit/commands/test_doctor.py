"""`yeonma doctor`, on this machine as it is."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from yeonma.cli import main
from yeonma.commands import doctor


def report(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str], list[str]]:
    """Exit status, text by subject, problems."""
    status = main(["doctor", *words])
    lines = capsys.readouterr().out.splitlines()
    split = lines.index("")
    subjects = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines[:split]}
    return status, subjects, lines[split + 1 :]


def test_the_report_names_what_is_installed_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "tokens").write_bytes(bytes(20_000_000))
    status, subjects, problems = report(capsys, "--cache_dir", str(tmp_path))
    assert f"torch {version('torch')}" in subjects["packages"]
    assert subjects["cache"].startswith(f"{tmp_path}: 0.02 GB used, ")
    assert subjects["hub"].startswith("not asked, because of $HF_HUB_OFFLINE")
    on_gpu = torch.cuda.is_available()
    assert subjects["device"].startswith("cpu (no GPU") is not on_gpu
    if not on_gpu:
        assert subjects["dtype"].startswith("float32")
    if not on_gpu:
        assert subjects["attention"] == "all segments below a common beginning in one call"
    assert subjects["hub's cache"].endswith(" GB free")
    assert {"yeonma", "python", "processor", "attention", "kernels", "quantization", "here"} <= set(subjects)
    if status == 0:
        assert problems == ["nothing is wrong"]
    assert "hub" not in report(capsys, "--hub", "false", "--cache_dir", str(tmp_path))[1]


def test_packages_that_a_run_needs_are_problems_with_a_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = ["no-such-package>=1.2", "numpy<1", "pytest>=1", 'other>=1; extra == "serve"']
    monkeypatch.setattr(doctor, "_requirements", lambda: needed)
    status, _, problems = report(capsys, "--hub", "false", "--cache_dir", str(tmp_path))
    assert status == 1
    assert problems[0].startswith(
        "! no-such-package is not installed, and Yeonma needs no-such-package>=1.2; "
    )
    assert "is installed, and Yeonma needs numpy<1; install Yeonma again" in problems[1]
    assert not any("pytest" in line or "other" in line for line in problems)


def test_a_cache_that_cannot_be_made_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    status, _, problems = report(capsys, "--hub", "false", "--cache_dir", str(tmp_path / "file" / "cache"))
    assert status == 1
    assert "cannot be made (Not a directory); name another with $YEONMA_CACHE" in problems[0]
