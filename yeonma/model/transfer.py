"""Numbers of the host on their way to a device, without the host waiting for it.

PyTorch runs ahead of a GPU: it queues kernels and goes on. An ordinary copy to the GPU ends that, because it waits
until all queued kernels are done, and so the GPU has nothing to do while the host lays out what comes next. A copy from
pinned memory is queued like a kernel.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike


def to_device(numbers: ArrayLike, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of these numbers, converted to `dtype` on the host if one is given.

    On the CPU it shares the memory of an array whose type stays. On a GPU the numbers are copied to pinned memory
    first, so that a later change of the array changes nothing.
    """
    tensor = torch.from_numpy(np.asarray(numbers))
    if dtype is not None:
        tensor = tensor.to(dtype)
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
