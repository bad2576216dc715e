"""Tiny models whose dense layers are held in 8 or 4 bits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from yeonma.config.settings import Quantization
from yeonma.model import load

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
INT8, NF4 = (pytest.param(kind, marks=needs_bitsandbytes) for kind in ("int8", "nf4"))
KINDS = (INT8, NF4, "fp8")
CPU = torch.device("cpu")


def loaded(folder: Path, kind: Quantization, dtype: torch.dtype = torch.float32) -> Any:
    return load.load_base(load.find_base(str(folder)), CPU, dtype, kind)


def adapted(folder: Path, kind: Quantization, dropout: float = 0.0) -> Any:
    """With an adapter whose second factor is drawn, too: it begins at 0, and with it the first one's gradient."""
    model = loaded(folder, kind)
    load.add_lora(model, load.LoraShape(4, 8, dropout, "all-linear"), seed=1)
    draw_second_factor(model)
    return model


def draw_second_factor(model: Any) -> None:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=draw)
