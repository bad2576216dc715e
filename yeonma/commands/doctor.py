"""`yeonma doctor`: what this installation consists of, what a run here would use, and what is wrong."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from yeonma import __version__
from yeonma.config.settings import DoctorSettings
from yeonma.errors import system_reason
from yeonma.messages import counted, tr
from yeonma.packages import MAIN, TESTED, install, version_of
from yeonma.platforms import usable_cores
from yeonma.streams import say

FAST = ("flash-linear-attention", "causal-conv1d", "flash-attn")
"""Packages of kernels that people ask about. Forests do not need them."""
LITTLE_SPACE = 5e9
ATTENTION = {
    "varlen": tr("varlen_attn, all segments in one call"),
    "flex": tr("FlexAttention, all segments in one call"),
    "cpu_cascade": tr("all segments below a common beginning in one call"),
    "sdpa": tr("scaled_dot_product_attention, segment by segment"),
}
"""Backend of an ordinary layer -> what it is."""
AGAIN = tr("install Yeonma again, with its packages")


@dataclass
class Report:
    """Lines by subject, and what is wrong."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, subject: str, text: str) -> None:
        self.lines.append((subject, text))


def run(settings: DoctorSettings) -> int:
    """Prints the report. Returns 1 if a run could fail for what it says."""
    report = Report()
    with ThreadPoolExecutor(1) as thread:
        failure = thread.submit(_hub_failure) if settings.hub else None
        _installation(report)
        _packages(report)
        _device(report)
        _disks(report, settings.cache_dir)
        if failure is not None:
            _hub(report, failure.result())
    width = max(cell_len(subject) for subject, _ in report.lines) + 2
    for subject, text in report.lines:
        say(f"{set_cell_size(subject, width)}{text}")
    say("")
    for problem in report.problems:
        say(f"! {problem}")
    if not report.problems:
        say(tr("nothing is wrong"))
    return int(bool(report.problems))


def _installation(report: Report) -> None:
    report.add("yeonma", tr("{version}, in {folder}", version=__version__, folder=Path(__file__).parents[1]))
    machine = f"{platform.system()} {platform.machine()}"
    report.add("python", tr("{version} on {machine}", version=platform.python_version(), machine=machine))


def _packages(report: Report) -> None:
    from packaging.requirements import Requirement

    required = [Requirement(text) for text in _requirements()]
    own = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in own:
        found = version_of(one.name)
        names = {"package": one.name, "needed": f"{one.name}{one.specifier}", "again": AGAIN}
        if found is None:
            report.problems.append(
                tr("{package} is not installed, and Yeonma needs {needed}; {again}", **names)
            )
        elif not one.specifier.contains(found, prereleases=True):
            names["found"] = found
            report.problems.append(
                tr("{package} {found} is installed, and Yeonma needs {needed}; {again}", **names)
            )
    report.add(tr("packages"), ", ".join(f"{name} {version_of(name)}" for name in MAIN))
    optional = {name: version_of(name) for name in (*sorted(TESTED), *FAST)}
    present = [f"{name} {found}" for name, found in optional.items() if found is not None]
    missing = [name for name, found in optional.items() if found is None]
    report.add(tr("optional"), ", ".join(present) or tr("none"))
    report.add(tr("not installed"), ", ".join(missing) or tr("none"))


def _requirements() -> list[str]:
    """Those of the installed package; none where only its source is used."""
    try:
        return requires("yeonma") or []
    except PackageNotFoundError:
        return []


def _device(report: Report) -> None:
    import torch

    from yeonma.model.load import pick_device, pick_dtype

    memory = _memory(torch.device("cpu"))
    report.add(
        tr("processor"),
        f"{counted(usable_cores(), 'core')}, {counted(torch.get_num_threads(), 'thread')}, {memory}",
    )
    device = pick_device("auto")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, whole = torch.cuda.mem_get_info(device)
        capability = f"{properties.major}.{properties.minor}"
        report.add(
            tr("device"),
            tr(
                "{name}, compute capability {capability}, {free:.1f} of {whole:.1f} GB free, CUDA {cuda}",
                name=properties.name,
                capability=capability,
                free=free / 1e9,
                whole=whole / 1e9,
                cuda=torch.version.cuda,
            ),
        )
    else:
        report.add(
            tr("device"),
            tr("cpu (no GPU that PyTorch can use)")
            if torch.version.cuda
            else tr("cpu (no GPU that PyTorch can use: this PyTorch is built for the CPU alone)"),
        )
    dtype = pick_dtype("auto", device)
    report.add("dtype", tr("{dtype} with --dtype auto", dtype=str(dtype).removeprefix("torch.")))
    report.add(tr("attention"), ATTENTION[_attention_backend(device, dtype)])
    compiles = tr("compiled by torch.compile") if device.type == "cuda" else tr("PyTorch's own operators")
    report.add(tr("kernels"), tr("{compiles} with --torch_compile auto", compiles=compiles))
    if version_of("bitsandbytes") is None:
        report.add(
            tr("quantization"),
            tr("fp8; int8 and nf4 need bitsandbytes: {install}", install=install("bitsandbytes")),
        )
    else:
        report.add(tr("quantization"), "int8, nf4, fp8")


def _attention_backend(device: Any, dtype: Any) -> str:
    """The backend that computes an ordinary layer, without soft-capping, sinks or dropout."""
    import torch

    from yeonma.model.attention.backend import ForestShape, LayerCall
    from yeonma.model.attention.dispatch import capability_of, choose, lay_out_for_backends

    shape = ForestShape((4, 2, 2), ((0,), (0, 1), (0, 2)), device, device.type, capability_of(device, dtype))
    states = torch.zeros(1, 2, sum(shape.lengths), 64, device=device, dtype=dtype)
    return choose(LayerCall(states, states, states), lay_out_for_backends(shape)).name


def _memory(device: Any) -> str:
    """What a run on the CPU may still use, and what the machine has."""
    from yeonma.train.memory_budget import free_memory

    free = free_memory(device)
    if free is None:
        return tr("memory unknown")
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return tr("{free:.1f} of {whole:.1f} GB of memory free", free=free / 1e9, whole=whole / 1e9)


def _disks(report: Report, given: str | None) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    from yeonma.files import default_cache_dir, free_bytes, user_path

    folder = user_path(given) if given is not None else default_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        report.add(tr("cache"), str(folder))
        report.problems.append(
            tr(
                "{folder}: cannot be made ({strerror}); name another with $YEONMA_CACHE",
                folder=folder,
                strerror=system_reason(error),
            )
        )
        return
    used = sum(map(_size, folder.rglob("*")))
    report.add(
        tr("cache"),
        tr(
            "{folder}: {used:.2f} GB used, {free:.1f} GB free on its disk",
            folder=folder,
            used=used / 1e9,
            free=free_bytes(folder) / 1e9,
        ),
    )
    hub_cache = Path(HF_HUB_CACHE)
    report.add(
        tr("hub's cache"),
        tr("{folder}: {free:.1f} GB free", folder=hub_cache, free=free_bytes(hub_cache) / 1e9),
    )
    here = Path.cwd()
    report.add(tr("here"), tr("{folder}: {free:.1f} GB free", folder=here, free=free_bytes(here) / 1e9))
    if not os.access(folder, os.W_OK):
        report.problems.append(
            tr("{folder}: cannot be written; name another with $YEONMA_CACHE", folder=folder)
        )
    for place in dict.fromkeys((folder, hub_cache, Path.cwd())):
        if free_bytes(place) < LITTLE_SPACE:
            report.problems.append(
                tr(
                    "{folder}: less than {least:.0f} GB free",
                    folder=place,
                    least=LITTLE_SPACE / 1e9,
                )
            )


def _size(path: Path) -> int:
    try:
        return 0 if path.is_symlink() or not path.is_file() else path.stat().st_size
    except OSError:
        return 0


def _hub_failure() -> str | None:
    """Why the hub does not answer; empty if it does, None if it must not be asked."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    from yeonma.hub import hub_failure

    return None if HF_HUB_OFFLINE else hub_failure()


def _hub(report: Report, failure: str | None) -> None:
    if failure is None:
        text = tr("not asked, because of $HF_HUB_OFFLINE; models and data of the hub come from its cache")
    elif failure:
        text = tr("does not answer ({failure}); folders on this machine work", failure=failure)
    else:
        text = tr("answers ").rstrip()  # with a blank, as `answers` alone is a noun
    report.add(tr("hub"), text)
