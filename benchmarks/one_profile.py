"""One training step of ours under PyTorch's profiler, as a script with a job file: kernels by time, how long the device
is idle, launches, and how often the program waits for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from gpu_contenders import Job, contenders
from gpu_measure import ours
from gpu_shapes import LORA_R, SHAPES
from harness import answer_job
from profile_kinds import Widths, by_kind, kind_of

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


def summary(
    events: Iterable[Any], on_device: Any, seconds: float, widths: Widths | None = None
) -> dict[str, Any]:
    """What the profiler's events say of a step that took `seconds` without it; microseconds become seconds.

    `widths`: of a CPU's step, whose operators call each other: each counts with the time that it spends by itself.
    """
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    spans, copies, waits = [], 0, 0
    for event in events:
        if event.is_user_annotation:  # a name for a stretch of time, also on the device: no work by itself
            continue
        if event.device_type == on_device:
            span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
            spans.append(span)
            spent, shapes = span[1] - span[0], ()
            if widths is not None:
                spent, shapes = event.self_cpu_time_total / 1e6, event.input_shapes
            entry = kernels[event.name, kind_of(event.name, shapes, widths)]
            entry[0] += spent
            entry[1] += 1
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
        "kinds": by_kind((kind, spent, int(calls)) for (_, kind), (spent, calls) in by_time),
        "kernels": [
            {"name": name[:NAME_LENGTH], "kind": kind, "seconds": spent, "calls": calls}
            for (name, kind), (spent, calls) in by_time[:KERNELS]
        ],
        "other_kernels_seconds": sum(spent for _, (spent, _) in by_time[KERNELS:]),
        "copies_to_host": copies,
        "waits": waits,
    }


Ran = TypeVar("Ran")


def profiled(
    run: Callable[[], Ran], number: int, *, cuda: bool, widths: Widths | None = None
) -> tuple[dict[str, Any], Ran]:
    """Run a training in this process, its step of this number under the profiler: the step's summary, and what the run
    returns. Raises SystemExit if it has no such step."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from yeonma.train import loop

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    plain, seconds, found = loop.train_step, [], {}

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def step(*arguments: Any, **keywords: Any) -> Any:
        wait()
        started = time.perf_counter()
        if len(seconds) + 1 != number:
            result = plain(*arguments, **keywords)
            wait()
        else:
            with profile(activities=activities, record_shapes=widths is not None) as profiler:
                result = plain(*arguments, **keywords)
                wait()
            under = time.perf_counter() - started
            device = DeviceType.CUDA if cuda else DeviceType.CPU
            # on the CPU, steps have other rows and so other lengths: the profiled step's own time counts
            usual = median(seconds[1:]) if cuda else under
            found.update(summary(profiler.events(), device, usual, widths))
            found["profiled_seconds"] = under
        seconds.append(time.perf_counter() - started)
        return result

    loop.train_step = step
    try:
        ran = run()
    finally:
        loop.train_step = plain
    if not found:
        raise SystemExit(f"the run had {len(seconds)} steps, and step {number} is profiled")
    return {**found, "seconds": seconds}, ran


def measure(given: dict[str, Any]) -> dict[str, Any]:
    import torch

    from yeonma.inspect.probe import measure_rate

    job = Job(
        Path(given["folder"]),
        given["workload"],
        given["about"],
        given["quantization"],
        given["device"],
        given["dtype"],
    )
    contender = contenders(job.about["pairs"])[given["contender"]]
    cuda = given["device"] == "cuda"
    widths = None if cuda else Widths(LORA_R, SHAPES[given["shape"]]["vocab_size"])
    found, measured = profiled(
        lambda: ours(contender, job, max_steps=PROFILED), PROFILED, cuda=cuda, widths=widths
    )
    return {
        **found,
        "shape": given["shape"],
        "step_tokens": job.about["steps"][PROFILED - 1]["tokens"],
        "step_trained_tokens": job.about["steps"][PROFILED - 1]["trained_tokens"],
        "matrix_rate": measure_rate(
            torch.device(given["device"]), getattr(torch, given["dtype"])
        ).flops_per_second,
        "peak_memory_bytes": measured.peak_memory_bytes,
    }


if __name__ == "__main__":
    answer_job(measure)
