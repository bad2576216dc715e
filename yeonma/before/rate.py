"""How fast the device multiplies matrices, by the very routine that frozen weights are multiplied with."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from yeonma.model.linear import product

SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns


@dataclass(frozen=True)
class Rate:
    flops_per_second: float


def measure_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Rate:
    """The best of the products that fit into `seconds`, at least two, after one that warms up."""
    size = SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        started = time.perf_counter()
        product(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return Rate(2 * size**3 / min(taken[1:]))
