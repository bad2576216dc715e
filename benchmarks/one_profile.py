"""One training step of ours under PyTorch's profiler, as a script with a job file: kernels by time, how long the device
is idle, launches, and how often the program waits for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from gpu_contenders import Job, contenders
from gpu_measure import ours
from harness import answer_job

PROFILED = 4
"""Which step is profiled. Those between the first and it are timed without the profiler, which slows Python down."""
KERNELS = 25
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""cudaDeviceSynchronize is the profiler's, and this script's."""
NAME_LENGTH = 120


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def summary(events: Iterable[Any], on_device: Any, seconds: float) -> dict[str, Any]:
    """What the profiler's events say of a step that took `seconds` without it; microseconds become seconds."""
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    spans, copies, waits = [], 0, 0
    for event in events:
        if event.is_user_annotation:  # a name for a stretch of time, also on the device: no work by itself
            continue
        if event.device_type == on_device:
            span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
            spans.append(span)
            kernels[event.name][0] += span[1] - span[0]
            kernels[event.name][1] += 1
            copies += event.name.startswith("Memcpy DtoH")
        elif event.name in WAITS:
            waits += 1
    busy = covered(spans)
    by_time = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "step_seconds": seconds,
        "busy_seconds": busy,
        "idle_share": max(0.0, 1 - busy / seconds),
        "launches": len(spans),
        "kernels": [
            {"name": name[:NAME_LENGTH], "seconds": spent, "calls": calls}
            for name, (spent, calls) in by_time[:KERNELS]
        ],
        "other_kernels_seconds": sum(spent for _, (spent, _) in by_time[KERNELS:]),
        "copies_to_host": copies,
        "waits": waits,
    }


def measure(given: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from yeonma.train import loop

    cuda = given["device"] == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plain, seconds, found = loop.train_step, [], {}

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def step(*arguments: Any, **keywords: Any) -> Any:
        wait()
        started = time.perf_counter()
        if len(seconds) + 1 != PROFILED:
            result = plain(*arguments, **keywords)
            wait()
        else:
            with profile(activities=activities) as profiler:
                result = plain(*arguments, **keywords)
                wait()
            usual = median(seconds[1:])
            found.update(summary(profiler.events(), DeviceType.CUDA if cuda else DeviceType.CPU, usual))
            found["profiled_seconds"] = time.perf_counter() - started
        seconds.append(time.perf_counter() - started)
        return result

    job = Job(
        Path(given["folder"]),
        given["workload"],
        given["about"],
        given["quantization"],
        given["device"],
        given["dtype"],
    )
    contender = contenders(job.about["pairs"])[given["contender"]]
    loop.train_step = step
    try:
        measured = ours(contender, job)
    finally:
        loop.train_step = plain
    if not found:
        raise SystemExit(f"the run had {len(seconds)} steps, and step {PROFILED} is profiled")
    return {**found, "peak_memory_bytes": measured.peak_memory_bytes}


if __name__ == "__main__":
    answer_job(measure)
