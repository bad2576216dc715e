"""Requirements of quantised bases and 8-bit optimizers, checked before torch is imported."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from yeonma.config.settings import Optimizer, Quantization
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.packages import install

MIN_8_BIT_NUMEL, BLOCK = 4096, 256
"""Of its 8-bit optimizers: the size from which a parameter's state is in 8 bits, and the numbers per scale."""
BY_BITSANDBYTES = ("int8", "nf4")


def check_installed(quantization: Quantization) -> None:
    """Raises UserError if the package that quantises the base is not installed."""
    if quantization in BY_BITSANDBYTES:
        _check_bitsandbytes(f"quantization {quantization}")


def quantised_by(quantization: Quantization) -> list[str]:
    """What quantised weights depend on, besides the original ones."""
    return [quantization, *([version("bitsandbytes")] if quantization in BY_BITSANDBYTES else [])]


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises UserError if the optimizer's package is not installed."""
    if optimizer != "adamw":
        _check_bitsandbytes(f"optimizer {optimizer}")


def check_optimizer_device(optimizer: Optimizer, device_type: str) -> None:
    """Raises UserError if the optimizer does not run on the kind of device, such as `cpu`."""
    if optimizer != "adamw" and device_type != "cuda":
        what = tr("it needs a CUDA device, and the device is {type}", type=device_type)
        raise UserError(what, place=f"optimizer {optimizer}", cure=tr("use --optimizer adamw"))


def _check_bitsandbytes(place: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise UserError(tr("bitsandbytes is not installed"), place=place, cure=install("bitsandbytes"))


def check_quantization(quantization: Quantization, *, shard: bool, use_dora: bool) -> None:
    """Raises UserError for settings that exclude each other, and if a package is missing."""
    check_installed(quantization)
    if quantization in BY_BITSANDBYTES:
        check_sharded_dora(f"quantization {quantization}", shard=shard, use_dora=use_dora)
    if quantization == "fp8" and use_dora:
        problem = tr("DoRA needs the unquantised weights, which fp8 does not keep")
        raise UserError(problem, place="quantization fp8", cure=tr("use int8 or nf4, or leave out use_dora"))


def check_sharded_dora(place: str, *, shard: bool, use_dora: bool) -> None:
    """Raises UserError for DoRA on packed weights, in settings or in the base that is the place, that are sharded."""
    if shard and use_dora:
        problem = tr(
            "DoRA needs the unquantised weights, and a process of a sharded run has a part of the packed ones"
        )
        raise UserError(problem, place=place, cure=tr("leave out use_dora, shard or the quantisation"))
