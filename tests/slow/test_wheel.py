"""A wheel, built and installed into a fresh environment outside the checkout: it holds all that the package needs, and
its commands run with nothing of the repository beside them.

The environment sees the packages of the one that runs the tests, but not its Yeonma.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.adapters import tiny_base
from tests.tokenizers import byte_level

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE")
QUIET_PIP = ("-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools writes beside the sources."""
    root = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "yeonma", root / "yeonma", ignore=shutil.ignore_patterns("__pycache__"))
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(root / "dist")]
    done = subprocess.run([sys.executable, *QUIET_PIP, *build, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (root / "dist").glob("yeonma-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with the wheel, and with the packages of this one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=True)
    python = next(root.glob("*/python"))
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(root), "platbase": str(root)}))
    (purelib / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    done = subprocess.run([python, *QUIET_PIP, *install], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python.parent


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.startswith("yeonma/")}
        scripts = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt")))
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    there = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in (ROOT / "yeonma").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sorted(packed) == sorted(there)
    assert packed == there
    assert b"yeonma = yeonma.cli:main" in scripts and licences


def test_the_commands_of_the_wheel_run_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    tiny_base(tmp_path / "base", byte_level())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [installed / "yeonma", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
        return done.stdout

    where = [installed / "python", "-c", "import yeonma; print(yeonma.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(installed.parent)
    model, template = ["--base_model", "base"], ["--template", "sample:title_en"]
    short = ["--cutoff_len", "800", "--max_steps", "1", "--batch_size", "2", "--card_rows", "1"]

    assert "learning_rate" in run("sft", "--help", "all")
    assert (
        "학습"
        in subprocess.run(
            [installed / "yeonma", "sft", "--help"],
            cwd=tmp_path,
            env={**environment, "YEONMA_LANG": "ko"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    run("demo", "--quick", "true", "--model_dir", "base")
    assert (tmp_path / "demo" / "report" / "report.html").is_file()
    assert "sample:news_ko:1" in run(
        "inspect", *model, "--data_path", "sample:news_ko", "--cutoff_len", "2000"
    )
    run("sft", *model, *template, *short, "--data_path", "sample:news_en", "--output_dir", "titles")
    answers = ["--limit", "2", "--max_new_tokens", "4", "--output", "answers.jsonl"]
    run("generate", "titles", "--data_path", "sample:news_en_validation", *answers)
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    rows = ["--data_path", "sample:news_en_validation", "--rows", "2", "--max_new_tokens", "4"]
    run("compare", "--models", "base", "titles", *rows, "--output_dir", "report")
    assert "<style" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "trained on sample:news_en" in run("verify", "titles", "--data_path", "sample:news_en")
