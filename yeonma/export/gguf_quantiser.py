"""llama.cpp's own quantiser, from a wheel: k-quants of a GGUF file.

A k-quant holds 256 weights of a row at a time. Where a row's length is no multiple of 256, as in many small models,
llama.cpp takes a larger type of 32 weights instead; how many matrices that concerns is counted in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from yeonma.errors import UserError
from yeonma.export.gguf_converter import CONVERTER
from yeonma.export.tool_folder import Tool, install_tool, last_line, run_in
from yeonma.messages import later, tr

VERSION = "0.2.18"
QUANTISER = Tool(
    name=later("llama.cpp's quantiser"),
    folder=f"cyllama-{VERSION}",
    packages=(f"cyllama=={VERSION}",),
    marker="cyllama/__init__.py",
)
K_QUANTS: Mapping[str, int] = MappingProxyType({"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18})
"""Name -> llama.cpp's number of the file type (`llama_ftype` in llama.h)."""
_QUANTISE = """\
import sys
from cyllama.llama import llama_cpp
source, target, kind = sys.argv[1:]
params = llama_cpp.LlamaModelQuantizeParams()
params.ftype = int(kind)
llama_cpp.model_quantize(source, target, params)
"""
_COUNT = """\
import json, sys
from collections import Counter
import gguf
tensors = gguf.GGUFReader(sys.argv[1]).tensors
print(json.dumps(Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)))
"""


@dataclass(frozen=True)
class QuantisedTypes:
    """The types of a file's matrices."""

    counts: Mapping[str, int]
    """Type -> number of matrices."""

    @property
    def matrices(self) -> int:
        return sum(self.counts.values())

    @property
    def fallen_back(self) -> int:
        """Matrices that are no k-quants."""
        return sum(count for name, count in self.counts.items() if not name.endswith("_K"))


def quantise(source: Path, target: Path, outtype: str) -> QuantisedTypes:
    """Writes the k-quant `outtype` of a GGUF file. Raises UserError if the quantiser cannot be installed or fails."""
    folder = install_tool(QUANTISER)
    words = [str(source.absolute()), str(target.absolute()), str(K_QUANTS[outtype])]
    done = run_in(folder, ["-c", _QUANTISE, *words])
    if done.returncode != 0 or not target.is_file():
        what = tr("llama.cpp's quantiser failed ({stderr})", stderr=last_line(done.stderr))
        raise UserError(what, place=str(source), cure=tr("take --outtype q8_0 or f16"))
    counted = run_in(install_tool(CONVERTER), ["-c", _COUNT, str(target.absolute())])
    if counted.returncode != 0:
        what = tr("the quantised file cannot be read ({stderr})", stderr=last_line(counted.stderr))
        raise UserError(what, place=str(target), cure=tr("take --outtype q8_0 or f16"))
    return QuantisedTypes(json.loads(counted.stdout))
