"""The device's rate of matrix products, kept on disk for a day, and a few real training steps, timed."""

from __future__ import annotations

import json
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from yeonma.batch.batch import Batch
from yeonma.batch.micro_batches import survey_micro_batches
from yeonma.config.settings import RunConfig
from yeonma.errors import Log
from yeonma.model import load
from yeonma.model.kernels.linear import product
from yeonma.run_folder.checkpoint import write_text_atomically
from yeonma.run_folder.progress import peak_memory_bytes
from yeonma.train.distributed import Processes
from yeonma.train.memory_budget import micro_batching
from yeonma.train.prepare import Prepared

RATE_SECONDS = 0.25
"""How long the products of a kept rate are measured."""
FRESH_SECONDS = 86_400
"""The age beyond which `device_rate` measures anew."""
SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns. On a CPU larger products are no faster, and three of them take most of a second."""


@dataclass(frozen=True)
class Rate:
    flops_per_second: float


def measure_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Rate:
    """The best rate among products that take `seconds` in total (at least two of them), after a warm-up.

    Uses the same routine as products with frozen weights. On the CPU, time in which other programs had the cores does
    not count: a rate that is kept should not be that of a busy moment.
    """
    size = SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started, worked = time.perf_counter(), time.process_time()
        product(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed, worked = time.perf_counter() - started, time.process_time() - worked
        if device.type == "cpu" and worked > 0:
            elapsed = min(elapsed, worked / torch.get_num_threads())
        times.append(elapsed)
    return Rate(2 * size**3 / min(times[1:]))


def device_rate(folder: Path, device: torch.device, dtype: torch.dtype) -> Rate:
    """The rate that was measured here within the last day, else a new measurement, which the cache folder keeps."""
    path = _rate_file(folder, device, dtype)
    kept = _kept_rate(path)
    if kept is not None and 0 <= time.time() - kept[1] < FRESH_SECONDS:
        return kept[0]
    rate = measure_rate(device, dtype, RATE_SECONDS)
    content = {"flops_per_second": rate.flops_per_second, "measured": time.time()}
    with suppress(OSError):  # a folder that cannot be written
        write_text_atomically(path, json.dumps(content))
    return rate


def known_rate(folder: Path, device: torch.device, dtype: torch.dtype) -> Rate | None:
    """The rate that was last measured here, however long ago; None if there is none. Measures nothing."""
    kept = _kept_rate(_rate_file(folder, device, dtype))
    return None if kept is None else kept[0]


def _kept_rate(path: Path) -> tuple[Rate, float] | None:
    """With the time of its measurement, in seconds since the epoch."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rate, measured = float(values["flops_per_second"]), float(values["measured"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (Rate(rate), measured) if 0 < rate < float("inf") else None


def _rate_file(folder: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """Rates differ by device, threads, number format and version of PyTorch; machines may share the folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    content = [device.type, name, torch.get_num_threads(), str(dtype), torch.__version__]
    return folder / f"{sha256(json.dumps(content).encode()).hexdigest()}.rate"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    model = next((line for line in lines if line.startswith("model name")), platform.processor())
    return f"{platform.machine()} {model}"


STEPS = 3


@dataclass(frozen=True)
class Probe:
    tokens_per_second: float
    """In the timed steps. A token that several examples share counts once per example."""
    peak_memory_bytes: int
    """As in metrics.jsonl: the peak of this process since its start, including earlier work."""
    steps: int
    seconds: float
    """Of the timed steps, without the first one."""


def probe_run(
    config: RunConfig,
    source: load.BaseSource,
    prepared: Prepared,
    log: Log,
    steps: int = STEPS,
) -> Probe:
    """Load the model as the run will, run the step with the heaviest micro-batch untimed, and time `steps` - 1 more.

    Uses one process, however many the run will have. Raises UserError as the run would.
    """
    from yeonma.model.train_mode import train_adapter
    from yeonma.train.build import build_objective, build_train_state, load_model, reference_extras
    from yeonma.train.step import train_step

    model, step = config.model, config.step
    device, plan, store = load.pick_device(model.device), prepared.plan, prepared.dataset.train.store
    batches = survey_micro_batches(plan, store, micro_batching(step), processes=1)
    probe_steps = [next(plan.steps(batches.heaviest_step)), *islice(plan.steps(), steps - 1)]
    probe_steps += probe_steps[: max(0, steps - len(probe_steps))]  # a plan of one step
    group, units = Processes(0, 1), np.unique(np.concatenate(probe_steps))
    loaded = load_model(config, source, device, prepared, log, group)
    extras = reference_extras(config, loaded, prepared, {store.key: (store, units)}, group, log)
    state = build_train_state(config, loaded, plan, build_objective(config), group)
    train_adapter(state.model)
    torch.manual_seed(step.seed)
    seconds, tokens = 0.0, 0
    for index, units in enumerate(probe_steps):
        started = time.perf_counter()
        # train_step reads the loss, so it waits for the GPU
        result = train_step(state, Batch.from_store(store, units, extras.get(store.key)))
        if index:
            seconds, tokens = seconds + time.perf_counter() - started, tokens + result.tokens
    return Probe(tokens / seconds, peak_memory_bytes(device.type), len(probe_steps), seconds)
