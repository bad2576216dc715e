"""Whether `--device cuda` can work, as far as it can be told without torch, whose import takes seconds."""

from __future__ import annotations

import ctypes
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from yeonma.errors import UserError
from yeonma.messages import tr

_DRIVERS = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
_AMD = Path("/dev/kfd")
NO_CUDA = tr("there is no usable CUDA device")
CURE_WITHOUT_CUDA = tr("use --device cpu or auto")


def check_device(device: str) -> None:
    """Raises UserError for `cuda` where torch was built without CUDA and ROCm, or where no GPU driver is installed.

    Passes where it is not certain; then `pick_device` decides.
    """
    if device == "cuda" and not _may_have_cuda():
        raise UserError(NO_CUDA, place="device", cure=CURE_WITHOUT_CUDA)


def is_certainly_cpu(device: str) -> bool:
    """Whether a run with this `--device` is on the CPU, as far as it is certain without torch."""
    return device == "cpu" or (device == "auto" and not _may_have_cuda())


def _may_have_cuda() -> bool:
    if (torch := sys.modules.get("torch")) is not None:  # in Python, and in tests
        return bool(torch.cuda.is_available())
    return _torch_has_cuda() and _has_driver()


def _has_driver() -> bool:
    if _AMD.exists():
        return True
    for name in _DRIVERS:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _torch_has_cuda() -> bool:
    """Read from the file that names the build, without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return True  # importing it will say what is wrong
    try:
        text = Path(spec.origin).with_name("version.py").read_text("utf-8")
    except OSError:
        return True
    builds = re.findall(r"^(?:cuda|hip)\b[^=\n]*= *(.+)$", text, re.MULTILINE)
    return not builds or any(build.strip() != "None" for build in builds)
