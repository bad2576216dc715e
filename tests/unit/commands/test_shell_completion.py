"""`yeonma completion` in real shells, without a terminal."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from yeonma.cli import VERBS, main
from yeonma.commands import shell_completion
from yeonma.commands.shell_completion import FILES, FOLDERS
from yeonma.config.parse import settings_of

shtab = pytest.importorskip("shtab")
in_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


def completed(script: str, line: str, folder: Path) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    code = f'{script}\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_yeonma; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", code, "-", *words], capture_output=True, text=True, cwd=folder, check=True
    )
    assert done.stderr == ""
    return sorted(filter(None, done.stdout.split("\n")))


def test_bash_completes_commands_settings_choices_files_and_folders(script: str, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "run.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    assert completed(script, "yeonma ", tmp_path) == sorted(VERBS)
    assert completed(script, "yeonma ver", tmp_path) == ["verify"]
    assert completed(script, "yeonma sft --lora_", tmp_path) == sorted(
        f"--{name}" for name in settings_of(VERBS["sft"].groups) if name.startswith("lora_")
    )
    assert "--loss" in completed(script, "yeonma dpo --lo", tmp_path)
    assert completed(script, "yeonma sft --train ", tmp_path) == ["full", "lora"]
    assert completed(script, "yeonma sft --base_model x --quantization n", tmp_path) == ["nf4", "none"]
    assert completed(script, "yeonma chat runs --trust_remote_code ", tmp_path) == ["false", "true"]
    assert completed(script, "yeonma sft --data_path r", tmp_path) == ["rows.jsonl", "run.yaml", "runs"]
    assert completed(script, "yeonma sft --config run.", tmp_path) == ["run.yaml"]
    assert completed(script, "yeonma sft --output_dir r", tmp_path) == ["runs"]
    assert completed(script, "yeonma chat r", tmp_path) == ["runs"]
    assert completed(script, "yeonma serve runs r", tmp_path) == ["runs"]
    assert completed(script, "yeonma compare --models runs r", tmp_path) == ["runs"]
    assert completed(script, "yeonma cache ", tmp_path) == ["clean", "list"]
    assert completed(script, "yeonma completion ", tmp_path) == ["bash", "zsh"]
    assert "all" in completed(script, "yeonma sft --help ", tmp_path)


def test_evaluating_the_script_registers_it_in_bash(script: str) -> None:
    done = subprocess.run(
        ["bash", "-c", 'eval "$1"; complete -p yeonma', "-", script],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "yeonma" and done.stderr == ""


@in_zsh
def test_evaluating_the_script_registers_it_in_zsh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "zsh"]) == 0
    code = 'autoload -Uz compinit && compinit -u -d "$1" && eval "$2" && print -r -- $_comps[yeonma]'
    command = ["zsh", "-fc", code, "-", str(tmp_path / "dump"), capsys.readouterr().out]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "LANG": "C.UTF-8"}
    )
    assert done.stdout.strip() == "_shtab_yeonma" and done.stderr == ""


def test_paths_are_settings_that_take_text() -> None:
    members = {
        name: setting.members
        for verb in VERBS.values()
        for name, setting in settings_of(verb.groups, verb.not_required, verb.defaults).items()
    }
    assert not set(FILES) & set(FOLDERS)
    for name in sorted({*FILES, *FOLDERS} - {"config"}):
        assert {str, list[str]} & set(members[name]), name
    unlisted = [
        name for name in members if name.endswith(("_dir", "_path", "_dirs")) and name not in FILES + FOLDERS
    ]
    assert unlisted == []


def test_without_shtab_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shell_completion, "find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'missing package: shtab; install it with: pip install "shtab==1.13.0"' in captured.err
