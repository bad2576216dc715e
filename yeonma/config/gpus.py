"""GPUs by name, for forecasts of runs on a GPU that is not here: memory, rate of products, bandwidth. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from yeonma.messages import later, tr

MIB = 2**20
GPU_EXAMPLE = later("a name such as rtx4090 or a size such as 24GB")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet describes it. Not measured here."""

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
    """Where rate and bandwidth are published."""


GPUS = (
    Gpu("h200", 143771 * MIB, (9, 0), 989e12, 4.8e12, "https://www.nvidia.com/en-us/data-center/h200/"),
    Gpu("h100", 81559 * MIB, (9, 0), 989e12, 3.35e12, "https://www.nvidia.com/en-us/data-center/h100/ (SXM)"),
    Gpu("a100-80", 81920 * MIB, (8, 0), 312e12, 2.039e12, "https://www.nvidia.com/en-us/data-center/a100/ (SXM)"),
    Gpu("a100-40", 40960 * MIB, (8, 0), 312e12, 1.555e12, "NVIDIA A100 white paper (2020)"),
    Gpu("l40s", 46068 * MIB, (8, 9), 362e12, 864e9, "https://www.nvidia.com/en-us/data-center/l40s/"),
    Gpu("l4", 23034 * MIB, (8, 9), 121e12, 300e9, "https://www.nvidia.com/en-us/data-center/l4/"),
    Gpu("t4", 15360 * MIB, (7, 5), 65e12, 300e9, "https://www.nvidia.com/en-us/data-center/tesla-t4/"),
    Gpu("rtx5090", 32607 * MIB, (12, 0), 209.5e12, 1.792e12, "NVIDIA RTX Blackwell white paper (2025)"),
    Gpu("rtx4090", 24564 * MIB, (8, 9), 165.2e12, 1.008e12, "NVIDIA Ada white paper (2022)"),
    Gpu("rtx3090", 24576 * MIB, (8, 6), 71e12, 936e9, "NVIDIA Ampere GA102 white paper (2020)"),
)  # fmt: skip
"""Where a data sheet gives a rate with sparsity, half of it stands here. Adding a GPU is adding a line."""


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
