"""What a run will need, before a weight is loaded: memory by part, time and money.

Memory follows from the config: the heaviest micro-batch that the run will form goes through the model on the meta
device (see `trace`). Time follows from that pass's operations and the device's measured rate, or from a probe of
real steps. All of it is for one process of a run.

Not counted is what the C library's heap loses in holes between tensors on the CPU. That was 0 to 15% of the measured
peak in most runs, and up to 40% with gradient checkpointing in a deep model with long micro-batches, whose tensors
are small beside those that come and go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from yeonma.before.batches import Batches, look_at_batches
from yeonma.before.probe import Probe
from yeonma.before.rate import Rate
from yeonma.before.trace import Blueprint, Trace, blueprint, trace
from yeonma.configure import group_of
from yeonma.errors import UserError
from yeonma.model import load
from yeonma.model.linear import KEPT_ROUTINES, frozen_linear, has_onednn
from yeonma.settings import LoraSettings, ModelSettings, StepSettings
from yeonma.train.loop import MicroBatching
from yeonma.train.prepare import Prepared, lora_shape
from yeonma.train.progress import peak_memory_bytes

ROUTINE_BYTES = (
    620_000  # of what oneDNN makes for one shape of a product; measured with oneDNN 3.12 on AVX-512
)
CHECKED = 4  # token counts that the check at loading goes through the model with

# Bytes for a weight: int8 with a float16 scale a row; nf4 in blocks of 64 with scales that are quantised themselves
# (Dettmers et al. 2023, arXiv:2305.14314).
QUANTISED = {"int8": 1.0, "nf4": 0.5 + 0.127 / 8}

# Shares of the rate of one large product that a run reaches: lowest, usual, highest. CPU: docs/benchmarks.md, with
# head, adapter and attention counted as the trace does. On a GPU nothing has been measured.
EFFICIENCY = {"cpu": (0.35, 0.5, 0.6), "cuda": (0.15, 0.35, 0.6)}


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at its peak, by part; on a GPU, what the tensors on it take."""

    process: int
    """Python, torch and the data, as they stand in this process now; 0 on a GPU."""
    weights: int
    """Of the frozen base. On the CPU they are pages of the file where it has the run's dtype."""
    lora: int
    gradients: int
    optimizer: int
    """AdamW's two averages for each trained parameter."""
    activations: int
    """What the heaviest micro-batch keeps for its backward pass; attention masks among them."""
    logits: int
    """The chunk that the head holds at once, or all where it does not run in chunks."""
    workspace: int
    """What operations need for a moment."""
    routines: int
    """What oneDNN keeps for the shapes that it has met; 0 where it plays no part."""
    loading: int
    """The peak while weights are read and converted; not a part of the sum."""

    @property
    def training(self) -> int:
        """Sum of the parts."""
        return sum(value for name, value in asdict(self).items() if name != "loading")

    @property
    def peak(self) -> int:
        return max(self.training, self.loading)


@dataclass(frozen=True)
class Alternative:
    """The same run with one setting changed."""

    name: str
    peak_bytes: int
    available: bool
    note: str


@dataclass(frozen=True)
class Time:
    """`seconds` of the training steps; without loading, evaluation and checkpoints."""

    tokens_per_second: float
    """Of the examples' own tokens: shared ones count for each."""
    seconds: float
    seconds_low: float
    seconds_high: float
    measured_by: Literal["rate", "probe"]


@dataclass(frozen=True)
class Price:
    """In whatever currency `price` was given in."""

    per_hour: float
    of_the_run: float
    tokens_per_hour: int
    epochs_per_hour: float


@dataclass(frozen=True)
class Forecast:
    device: str
    dtype: str
    parameters_trained: int
    parameters_frozen: int
    steps: int
    epochs: float
    tokens: int
    """Examples' own tokens over all steps."""
    heaviest_units: int
    """Examples, or pairs, of the heaviest micro-batch."""
    heaviest_tokens: int
    """Tokens of the heaviest micro-batch, shared ones counted once."""
    memory: Memory
    alternatives: tuple[Alternative, ...]
    time: Time | None
    price: Price | None


def forecast_run(
    settings: Mapping[type, object],
    source: load.BaseSource,
    prepared: Prepared,
    *,
    processes: int = 1,
    rate: Rate | None = None,
    probe: Probe | None = None,
    price: float | None = None,
    with_alternatives: bool = True,
) -> Forecast:
    """`settings` as of a training run, `prepared` by `train.prepare`; `processes` that the run will have.

    Time comes from `probe` (`probe_run`), else from `rate` (`measure_rate`), else there is none. `price` is of an
    hour, of one device. Call it before anything large is held: what this process holds counts as the process.
    The base is taken to be one that forests can be trained on, which the run itself will see at loading.
    Raises UserError for target modules that the model does not have, and for a model that cannot be traced.
    """
    model, step = group_of(settings, ModelSettings), group_of(settings, StepSettings)
    device = load.pick_device(model.device)
    dtype = load.pick_dtype(model.dtype, device)
    case = _Case(
        config=load.load_config(source),
        lora=prepared.adapter or lora_shape(group_of(settings, LoraSettings)),
        trust_remote_code=source.trust_remote_code,
        device=device.type,
        dtype=dtype,
        gradient_checkpointing=model.gradient_checkpointing,
        micro=MicroBatching(step.micro_batch_size, step.micro_batch_tokens, step.share_prefix),
        processes=processes,
    )
    drawn = _draw(case)
    process = _process_bytes(device.type)
    batches = look_at_batches(prepared.plan, prepared.dataset.train.store, case.micro, processes)
    traced = trace(drawn, batches.heaviest, has_gradients=batches.several)
    memory = _memory(case, drawn, batches, traced, process, prepared.plan.total_steps)
    tokens = _tokens(prepared)
    time = None
    if probe is not None:
        seconds = tokens / probe.tokens_per_second
        time = Time(probe.tokens_per_second, seconds, 0.9 * seconds, 1.1 * seconds, "probe")
    elif rate is not None:
        time = _time_by_rate(case, rate, traced, batches, tokens)
    return Forecast(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        parameters_trained=drawn.trained,
        parameters_frozen=drawn.frozen,
        steps=prepared.plan.total_steps,
        epochs=prepared.plan.epoch_at(prepared.plan.total_steps),
        tokens=tokens,
        heaviest_units=batches.heaviest_units,
        heaviest_tokens=traced.tokens,
        memory=memory,
        alternatives=_alternatives(case, drawn, prepared, memory, process) if with_alternatives else (),
        time=time,
        price=_price(price, time, prepared, tokens, processes) if price is not None and time else None,
    )


@dataclass(frozen=True)
class _Case:
    """What memory depends on, beside the data."""

    config: Any
    lora: load.LoraShape | str
    trust_remote_code: bool
    device: str
    dtype: torch.dtype
    gradient_checkpointing: bool
    micro: MicroBatching
    processes: int


def _draw(case: _Case) -> Blueprint:
    return blueprint(
        case.config,
        case.dtype,
        case.lora,
        trust_remote_code=case.trust_remote_code,
        gradient_checkpointing=case.gradient_checkpointing,
    )


def _memory(
    case: _Case, drawn: Blueprint, batches: Batches, traced: Trace, process: int, steps: int
) -> Memory:
    loading = process + drawn.weight_bytes
    stored = getattr(case.config, "dtype", None) or case.dtype
    if case.device == "cpu" and stored != case.dtype:  # the file's pages and the converted weights at once
        loading += drawn.frozen * stored.itemsize
    routines = 0
    if case.device == "cpu" and case.dtype == torch.float32 and has_onednn():
        met = batches.distinct * traced.shapes + CHECKED * traced.forward_shapes
        routines = min(KEPT_ROUTINES, met) * ROUTINE_BYTES
    return Memory(
        process=process,
        weights=drawn.weight_bytes,
        lora=drawn.trained_bytes,
        gradients=traced.gradients,
        optimizer=2 * drawn.trained_bytes if steps > 1 else 0,  # made by the first step, after its peak
        activations=traced.activations,
        logits=traced.logits,
        workspace=traced.workspace,
        routines=routines,
        loading=loading,
    )


def _process_bytes(device_type: str) -> int:
    """Resident bytes of this process, once the code of a step is in memory; 0 for a GPU, where only tensors count."""
    if device_type == "cuda":
        return 0
    weight, trained = torch.zeros(64, 64), torch.zeros(64, 64, requires_grad=True)
    hidden = frozen_linear(trained, weight, None)
    heads = hidden.view(1, 4, 64, 16)
    attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    attended.log_softmax(-1).sum().backward()
    torch.optim.AdamW([trained], fused=True).step()
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak_memory_bytes(device_type)


def _alternatives(
    case: _Case, drawn: Blueprint, prepared: Prepared, memory: Memory, process: int
) -> tuple[Alternative, ...]:
    """What is cheaper, each by itself."""
    found: list[Alternative] = []

    def add(name: str, note: str, **changed: Any) -> None:
        other = replace(case, **changed)
        try:
            other_drawn = _draw(other)
            store = prepared.dataset.train.store
            batches = look_at_batches(prepared.plan, store, other.micro, other.processes)
            traced = trace(other_drawn, batches.heaviest, has_gradients=batches.several)
        except (UserError, ValueError):  # a model without checkpointing, or without that precision
            return
        steps = prepared.plan.total_steps
        other_memory = _memory(other, other_drawn, batches, traced, process, steps)
        found.append(Alternative(name, other_memory.peak, True, note))

    if not case.gradient_checkpointing:
        add("gradient_checkpointing true", "about a third more time", gradient_checkpointing=True)
    most = case.micro.most_examples
    for fewer in sorted({most // 2, 1} - {0, most}, reverse=True):
        add(f"micro_batch_size {fewer}", "the same result", micro=replace(case.micro, most_examples=fewer))
    if case.dtype == torch.float32:
        slow = ", slow on most CPUs" if case.device == "cpu" else ""
        add("dtype bfloat16", f"coarser numbers{slow}", dtype=torch.bfloat16)
    for name, each in QUANTISED.items():
        saved = int(drawn.dense * (case.dtype.itemsize - each))
        peak = replace(memory, weights=memory.weights - saved).training
        found.append(Alternative(name, peak, False, "not in this version; only the weights are counted anew"))
    return tuple(found)


def _tokens(prepared: Prepared) -> int:
    """Of all steps, a pair's prompt counted once: whole epochs, and the steps of the last one."""
    plan, lengths = prepared.plan, prepared.dataset.train.store.unit_lengths
    epochs, rest = divmod(plan.total_steps, plan.steps_per_epoch)
    tokens = epochs * int(plan.lengths.sum())
    last = plan.steps(epochs * plan.steps_per_epoch)
    return tokens + sum(int(lengths[units].sum()) for units in last) if rest else tokens


def _time_by_rate(case: _Case, rate: Rate, traced: Trace, batches: Batches, tokens: int) -> Time:
    """A rough estimate: the heaviest micro-batch's operations for each token hold for all."""
    flops = tokens * batches.forest_tokens * traced.flops / traced.tokens / case.processes
    low, usual, high = (flops / (share * rate.flops_per_second) for share in EFFICIENCY[case.device])
    return Time(tokens / usual, usual, seconds_low=high, seconds_high=low, measured_by="rate")


def _price(price: float, time: Time, prepared: Prepared, tokens: int, processes: int) -> Price:
    per_hour = price * processes
    epoch = int(prepared.plan.lengths.sum())
    tokens_per_hour = time.tokens_per_second * 3600
    return Price(
        per_hour=price,
        of_the_run=per_hour * time.seconds / 3600,
        tokens_per_hour=int(tokens_per_hour),
        epochs_per_hour=tokens_per_hour / epoch,
    )


def forecast_dict(forecast: Forecast) -> dict[str, Any]:
    """For JSON: the fields by their names, and the two sums of memory."""
    found = asdict(forecast)
    found["memory"] |= {"training": forecast.memory.training, "peak": forecast.memory.peak}
    return found


def forecast_lines(forecast: Forecast, units: str = "examples") -> list[tuple[str, str]]:
    """(what, value) for a terminal; `units`: what a step counts."""
    lines = [
        ("parameters", f"{forecast.parameters_trained:,} trained, {forecast.parameters_frozen:,} frozen"),
        ("steps", f"{forecast.steps:,} ({forecast.epochs:.2f} epochs, {forecast.tokens:,} tokens)"),
        (
            "heaviest micro-batch",
            f"{forecast.heaviest_units} {units}, {forecast.heaviest_tokens:,} tokens",
        ),
        ("peak memory", f"{_size(forecast.memory.peak)} on {forecast.device}, {forecast.dtype}"),
    ]
    parts = {name: value for name, value in asdict(forecast.memory).items() if name != "loading" and value}
    lines += [(f"  {name}", _size(value)) for name, value in parts.items()]
    if forecast.memory.loading > forecast.memory.training:
        lines.append(("  while loading", _size(forecast.memory.loading)))
    lines += [
        (f"  with {each.name}", f"{_size(each.peak_bytes)} ({each.note})") for each in forecast.alternatives
    ]
    time, price = forecast.time, forecast.price
    if time is not None:
        how = "measured by real steps" if time.measured_by == "probe" else "roughly, by the device's rate"
        spread = f"{_duration(time.seconds_low)} to {_duration(time.seconds_high)}"
        lines.append(("time", f"{_duration(time.seconds)} ({spread}), {how}"))
        lines.append(("speed", f"{time.tokens_per_second:,.0f} tokens/s"))
    if price is not None:
        lines.append(("price", f"{price.of_the_run:,.2f} at {price.per_hour:g} an hour"))
        bought = f"{price.tokens_per_hour:,} tokens, {price.epochs_per_hour:.2f} epochs"
        lines.append(("an hour buys", bought))
    return lines


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 100 else f"{minutes // 60}h{minutes % 60:02d}m"
