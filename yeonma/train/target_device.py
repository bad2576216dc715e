"""The device that a run is planned for: one of this machine, or a GPU that only its data sheet describes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from yeonma.config.gpus import Gpu, gpu_named
from yeonma.config.settings import ModelSettings
from yeonma.errors import UserError
from yeonma.model import load
from yeonma.model.attention.backend import MIN_CAPABILITY, Capability


@dataclass(frozen=True)
class TargetDevice:
    device: torch.device
    gpu: Gpu | None = None
    """The data sheet of a GPU that is not here; None for a device of this machine."""

    @property
    def planned(self) -> Capability | None:
        """The compute capability of a GPU that is not here."""
        return self.gpu.capability if self.gpu is not None else None

    @property
    def name(self) -> str:
        """For messages: `rtx4090`, `24 GB`, `cpu` or `cuda:0`."""
        return self.gpu.name if self.gpu is not None else str(self.device)

    def dtype(self, model: ModelSettings) -> torch.dtype:
        """The number format of a run. auto: as `pick_dtype`, but float32 for full fine-tuning where that has float16,
        in which gradients of weights are lost. Raises UserError as `pick_dtype`."""
        has_bfloat16 = None if self.planned is None else self.planned >= MIN_CAPABILITY
        dtype = load.pick_dtype(model.dtype, self.device, has_bfloat16=has_bfloat16)
        is_lost = model.train == "full" and dtype == torch.float16
        return torch.float32 if is_lost else dtype


def target_device(setting: str, gpu: str | None = None) -> TargetDevice:
    """The device of the setting `device`, or the GPU of `--gpu`. Raises UserError if there is no such device here, or
    if both are given."""
    if gpu is None:
        return TargetDevice(load.pick_device(setting))
    if setting != "auto":
        what = "it has no meaning for another machine's GPU"
        raise UserError(what, place=f"device {setting}", cure="leave out --gpu or --device")
    return TargetDevice(torch.device("cuda"), gpu_named(gpu))
