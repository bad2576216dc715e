"""GPUs by name, for forecasts of runs on a GPU that is not here: memory, rate of products, bandwidth. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from yeonma.messages import later, tr

MIB = 2**20
GPU_EXAMPLE = later("a name such as rtx4090 or a size such as 24GB")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet describes it."""

    name: str
    memory_bytes: int
    """What the driver reports (`nvidia-smi`), which may be less than the data sheet's round number."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    flops_per_second: float | None = None
    """Dense products of bfloat16, or of float16 before compute capability 8, summed in float32; None if unknown."""
    bytes_per_second: float | None = None
    """Memory bandwidth; None if unknown."""
    source: str = ""
    """Where rate and bandwidth were read."""


GPUS = (
    Gpu("h200", 143771 * MIB, (9, 0), 989e12, 4.8e12,
        "https://glennklockwood.com/garden/processors/h100, https://www.aiminingco.com/gpu/h200/specs"),
    Gpu("h100", 81559 * MIB, (9, 0), 989e12, 3.35e12,
        "https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html (SXM)"),
    Gpu("a100-80", 81920 * MIB, (8, 0), 312e12, 2.039e12, "https://glennklockwood.com/garden/processors/A100 (SXM)"),
    Gpu("a100-40", 40960 * MIB, (8, 0), 312e12, 1.555e12,
        "https://upb-pc2.atlassian.net/wiki/spaces/PC2DOK/pages/1900609 (Paderborn Center for Parallel Computing)"),
    Gpu("l40s", 46068 * MIB, (8, 9), 362e12, 864e9, "https://www.mullet.se/product.html?product_id=355414"),
    Gpu("l4", 23034 * MIB, (8, 9), 121e12, 300e9, "https://cloudgputracker.com/compare/nvidia-l4-vs-nvidia-t4"),
    Gpu("t4", 15360 * MIB, (7, 5), 65e12, 320e9, "https://topcpu.net/en/gpu-c/l4-vs-tesla-t4"),
    Gpu("rtx5090", 32607 * MIB, (12, 0), 209.5e12, 1.792e12, "https://www.codesota.com/hardware/rtx-5090"),
    Gpu("rtx4090", 24564 * MIB, (8, 9), 165.2e12, 1.008e12,
        "https://waredb.com/processor/nvidia-geforce-rtx-4090"),
    Gpu("rtx3090", 24576 * MIB, (8, 6), 71e12, 936e9,
        "https://holynerdvana.blogspot.com/2022/10/nvidia-geforce-rtx-3090-specifications.html"),
)  # fmt: skip
"""Rates and bandwidths agree with the pages named, which repeat NVIDIA's data sheets and were read on 2026-11-30.
NVIDIA's own pages could not be opened then. The memory that the driver reports is on none of them and was not checked.
Where a page gives a rate with sparsity, half of it stands here; the RTX 3090's is half of its rate with sums in
float16. Adding a GPU is adding a line."""


class UnknownGpu(ValueError):
    """A text that is no GPU of the table and no size of memory. `cure` says what to write."""

    cure = tr(
        "give one of {gpus}, or the size of its memory, such as 24GB",
        gpus=", ".join(gpu.name for gpu in GPUS),
    )


def gpu_named(text: str) -> Gpu:
    """The GPU of a setting: a name of the table, written with or without blanks, hyphens and `NVIDIA`, or a bare size,
    of which only the memory is known. Raises UnknownGpu."""
    if size := re.fullmatch(r"\s*(\d{1,5}(?:\.\d{1,3})?)\s*(g|gb|gib)\s*", text, re.ASCII | re.IGNORECASE):
        unit = 2**30 if size[2].casefold() == "gib" else 10**9
        if memory := round(float(size[1]) * unit):
            return Gpu(f"{size[1]} {size[2]}", memory, (8, 0))
    for gpu in GPUS:
        if _plain(text) in (_plain(gpu.name), f"{_plain(gpu.name)}gb"):
            return gpu
    similar = [gpu.name for gpu in GPUS if len(_plain(text)) > 2 and gpu.name.startswith(_plain(text))]
    raise UnknownGpu(
        tr('"{text}" may be {similar}', text=text, similar=tr(" or ").join(similar))
        if similar
        else tr('"{text}" is not in the table', text=text)
    )


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]|nvidia|geforce|tesla", "", name.casefold())
