"""What quantised bases and 8-bit optimizers require, checked before torch is imported."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from yeonma.config.settings import Optimizer, Quantization
from yeonma.errors import UserError

BITSANDBYTES = "bitsandbytes==0.50.2"
"""The version that Yeonma is tested with, as in pyproject.toml."""
LEAST_IN_8_BITS, BLOCK = 4096, 256
"""Of its 8-bit optimizers: the smallest parameter whose state is in 8 bits, and the numbers that share a scale."""
BY_BITSANDBYTES = ("int8", "nf4")


def check_installed(quantization: Quantization) -> None:
    """Raises UserError where the package that quantises the base is not installed."""
    if quantization in BY_BITSANDBYTES:
        _check_bitsandbytes(f"quantization {quantization}")


def quantised_by(quantization: Quantization) -> list[str]:
    """What the quantised numbers depend on, beside the weights."""
    return [quantization, *([version("bitsandbytes")] if quantization in BY_BITSANDBYTES else [])]


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises UserError where the optimizer's package is not installed."""
    if optimizer != "adamw":
        _check_bitsandbytes(f"optimizer {optimizer}")


def _check_bitsandbytes(place: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise UserError("bitsandbytes is not installed", place=place, cure=f"pip install {BITSANDBYTES}")


def check_quantization(quantization: Quantization, *, shard: bool, use_dora: bool) -> None:
    """Raises UserError for settings that exclude each other, and where a package is not installed."""
    check_installed(quantization)
    if quantization != "none" and shard:
        what = "quantised weights cannot be sharded in this version"
        raise UserError(what, place=f"quantization {quantization}", cure="leave out shard or quantization")
    if quantization == "fp8" and use_dora:
        what = "DoRA needs the unquantised weights, which fp8 does not keep"
        raise UserError(what, place="quantization fp8", cure="use int8 or nf4, or leave out use_dora")
