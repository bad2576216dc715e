"""`yeonma doctor`: what this installation consists of, what a run here would use, and what is wrong."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from yeonma import __version__
from yeonma.config.settings import DoctorSettings
from yeonma.messages import counted, tr
from yeonma.packages import MAIN, TESTED, install, version_of
from yeonma.platforms import usable_cores
from yeonma.streams import say

FAST = ("flash-linear-attention", "causal-conv1d", "flash-attn")
"""Packages of kernels that people ask about. Forests do not need them."""
LITTLE_SPACE = 5e9
ATTENTION = {
    "varlen": "varlen_attn, all segments in one call",
    "flex": "FlexAttention, all segments in one call",
    "cpu_cascade": "all segments below a common beginning in one call",
    "sdpa": "scaled_dot_product_attention, segment by segment",
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
    width = max(len(subject) for subject, _ in report.lines) + 2
    for subject, text in report.lines:
        say(f"{subject:{width}}{text}")
    say("")
    for problem in report.problems:
        say(f"! {problem}")
    if not report.problems:
        say(tr("nothing is wrong"))
    return int(bool(report.problems))


def _installation(report: Report) -> None:
    report.add("yeonma", f"{__version__}, in {Path(__file__).parents[1]}")
    report.add("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages(report: Report) -> None:
    from packaging.requirements import Requirement

    required = [Requirement(text) for text in _requirements()]
    own = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in own:
        found = version_of(one.name)
        needs = tr("Yeonma needs {one}{specifier}", one=one.name, specifier=one.specifier)
        if found is None:
            report.problems.append(
                tr("{one} is not installed, and {needs}; {again}", one=one.name, needs=needs, again=AGAIN)
            )
        elif not one.specifier.contains(found, prereleases=True):
            report.problems.append(
                tr(
                    "{one} {found} is installed, and {needs}; {again}",
                    one=one.name,
                    found=found,
                    needs=needs,
                    again=AGAIN,
                )
            )
    report.add("packages", ", ".join(f"{name} {version_of(name)}" for name in MAIN))
    optional = {name: version_of(name) for name in (*sorted(TESTED), *FAST)}
    present = [f"{name} {found}" for name, found in optional.items() if found is not None]
    missing = [name for name, found in optional.items() if found is None]
    report.add("optional", ", ".join(present) or "none")
    report.add(tr("not installed"), ", ".join(missing) or "none")


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
        "processor",
        f"{counted(usable_cores(), 'core')}, {counted(torch.get_num_threads(), 'thread')}, {memory}",
    )
    device = pick_device("auto")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, whole = torch.cuda.mem_get_info(device)
        capability = f"{properties.major}.{properties.minor}"
        text = tr(
            "{properties}, compute capability {capability}", properties=properties.name, capability=capability
        )
        report.add(
            "device",
            tr(
                "{text}, {free:.1f} of {whole:.1f} GB free, CUDA {cuda}",
                text=text,
                free=free / 1e9,
                whole=whole / 1e9,
                cuda=torch.version.cuda,
            ),
        )
    else:
        built = "" if torch.version.cuda else tr(": this PyTorch is built for the CPU alone")
        report.add("device", tr("cpu (no GPU that PyTorch can use{built})", built=built))
    dtype = pick_dtype("auto", device)
    report.add("dtype", tr("{dtype} with --dtype auto", dtype=str(dtype).removeprefix("torch.")))
    report.add("attention", ATTENTION[_attention_backend(device, dtype)])
    compiles = tr("compiled by torch.compile") if device.type == "cuda" else tr("PyTorch's own operators")
    report.add("kernels", tr("{compiles} with --torch_compile auto", compiles=compiles))
    if version_of("bitsandbytes") is None:
        report.add(
            "quantization",
            tr("fp8; int8 and nf4 need bitsandbytes: {install}", install=install("bitsandbytes")),
        )
    else:
        report.add("quantization", tr("int8, nf4, fp8"))


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
        report.add("cache", str(folder))
        report.problems.append(
            tr(
                "{folder}: cannot be made ({strerror}); name another with $YEONMA_CACHE",
                folder=folder,
                strerror=error.strerror,
            )
        )
        return
    used = sum(map(_size, folder.rglob("*")))
    report.add(
        "cache",
        tr(
            "{folder}: {used:.2f} GB used, {folder2:.1f} GB free on its disk",
            folder=folder,
            used=used / 1e9,
            folder2=free_bytes(folder) / 1e9,
        ),
    )
    hub_cache = Path(HF_HUB_CACHE)
    report.add("hub's cache", f"{hub_cache}: {free_bytes(hub_cache) / 1e9:.1f} GB free")
    report.add("here", f"{Path.cwd()}: {free_bytes(Path.cwd()) / 1e9:.1f} GB free")
    if not os.access(folder, os.W_OK):
        report.problems.append(
            tr("{folder}: cannot be written; name another with $YEONMA_CACHE", folder=folder)
        )
    for place in dict.fromkeys((folder, hub_cache, Path.cwd())):
        if free_bytes(place) < LITTLE_SPACE:
            report.problems.append(
                tr(
                    "{place}: less than {little_space:.0f} GB free",
                    place=place,
                    little_space=LITTLE_SPACE / 1e9,
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
        text = "answers"
    report.add("hub", text)
