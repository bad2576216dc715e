"""A forecast of one process of a run: parameters, memory by part, time and price, as numbers and as text.

`yeonma.inspect.estimate` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from yeonma.model.targets import Coverage, PartCoverage

# The fraction of the rate of a large matrix product that a run reaches: lowest, usual, highest. CPU:
# docs/benchmarks.md, with head, adapter and attention counted as in the trace. GPU: not measured.
EFFICIENCY = {"cpu": (0.35, 0.5, 0.6), "cuda": (0.15, 0.35, 0.6)}


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process in bytes, by part. On a GPU only tensors count."""

    process: int
    """Python, torch and the data, as measured in this process; 0 on a GPU."""
    weights: int
    """The base's weights. On the CPU, they are pages of the file if it has the run's dtype."""
    lora: int
    """The adapter."""
    gradients: int
    optimizer: int
    """AdamW's two moments of the trained parameters."""
    activations: int
    """Tensors that the heaviest micro-batch saves for the backward pass, including attention masks."""
    logits: int
    """A chunk of logits; all logits if the head does not run in chunks."""
    workspace: int
    """Temporary memory of operations."""
    routines: int
    """Routines that oneDNN caches, one per shape; 0 if it is not used."""
    loading: int
    """Peak while weights are loaded and converted. Not included in `training`."""
    copies: int = 0
    """Of weights that are all trained: float32 copies of those in bfloat16, and the weights of the start if every step
    measures the reference."""
    gathered: int = 0
    """Sharded weights that are gathered at a time: those of the running layer and the next one."""

    @property
    def training(self) -> int:
        """Sum of the parts."""
        return sum(value for name, value in asdict(self).items() if name != "loading")

    @property
    def peak(self) -> int:
        return max(self.training, self.loading)


@dataclass(frozen=True)
class Alternative:
    """The peak memory of the run with one setting changed."""

    name: str
    peak_bytes: int
    available: bool
    note: str


@dataclass(frozen=True)
class Time:
    """Time of the training steps, without loading, evaluation and checkpoints."""

    tokens_per_second: float
    """A token that several examples share counts once per example."""
    seconds: float
    seconds_low: float
    seconds_high: float
    measured_by: Literal["rate", "probe"]


@dataclass(frozen=True)
class Price:
    """In the currency of the setting `price`."""

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
    processes: int
    tokens: int
    """Tokens of all steps. A token that several examples share counts once per example."""
    tokens_per_epoch: int
    operations: float
    """Floating point operations of all steps in one process, at the cost per token of the heaviest micro-batch."""
    heaviest_units: int
    """Examples, or pairs, in the heaviest micro-batch."""
    heaviest_tokens: int
    """Tokens of the heaviest micro-batch. Shared tokens count once."""
    memory: Memory
    alternatives: tuple[Alternative, ...]
    adapter: Coverage | None
    """What of the model has an adapter; None if all weights are trained."""
    time: Time | None
    price: Price | None
    published: str = ""
    """How the base's files are quantised and how its weights are held, in words; empty if they are not."""


def timed_by_rate(forecast: Forecast, flops_per_second: float, price: float | None = None) -> Forecast:
    """The forecast with a rough time from the device's rate of matrix products. `price`: of one device per hour."""
    fractions = EFFICIENCY[forecast.device.partition(":")[0]]
    low, usual, high = (forecast.operations / (fraction * flops_per_second) for fraction in fractions)
    time = Time(forecast.tokens / usual, usual, seconds_low=high, seconds_high=low, measured_by="rate")
    return _with_time(forecast, time, price)


def timed_by_probe(forecast: Forecast, tokens_per_second: float, price: float | None = None) -> Forecast:
    """The forecast with the time of measured steps."""
    seconds = forecast.tokens / tokens_per_second
    time = Time(tokens_per_second, seconds, 0.9 * seconds, 1.1 * seconds, "probe")
    return _with_time(forecast, time, price)


def _with_time(forecast: Forecast, time: Time, price: float | None) -> Forecast:
    if price is None:
        return replace(forecast, time=time, price=None)
    per_hour = price * forecast.processes
    tokens_per_hour = time.tokens_per_second * 3600
    run_price = Price(
        per_hour=price,
        of_the_run=per_hour * time.seconds / 3600,
        tokens_per_hour=int(tokens_per_hour),
        epochs_per_hour=tokens_per_hour / forecast.tokens_per_epoch,
    )
    return replace(forecast, time=time, price=run_price)


def forecast_dict(forecast: Forecast) -> dict[str, Any]:
    """The forecast for JSON, with the sums `training` and `peak` of memory."""
    values = asdict(forecast)
    values["memory"] |= {"training": forecast.memory.training, "peak": forecast.memory.peak}
    return values


def forecast_of(values: Mapping[str, Any]) -> Forecast:
    """The forecast from a `forecast_dict`, without time and price. Raises KeyError or TypeError for other values."""
    memory = {name: value for name, value in values["memory"].items() if name not in ("training", "peak")}
    alternatives = tuple(Alternative(**fields) for fields in values["alternatives"])
    adapter = None
    if values["adapter"] is not None:
        adapter = Coverage(
            tuple(
                PartCoverage(**{**part, "names": tuple(part["names"]), "without": tuple(part["without"])})
                for part in values["adapter"]["parts"]
            ),
            tuple(values["adapter"]["whole"]),
            values["adapter"]["tokens"],
        )
    parts = {"memory": Memory(**memory), "alternatives": alternatives, "time": None, "price": None}
    return Forecast(**{**values, **parts, "adapter": adapter})


def forecast_lines(forecast: Forecast, units: str = "examples") -> list[tuple[str, str]]:
    """(name, value) lines for display. `units`: what a step consists of, such as `pairs`."""
    lines = [
        ("parameters", f"{forecast.parameters_trained:,} trained, {forecast.parameters_frozen:,} frozen"),
        *([("base weights", forecast.published)] if forecast.published else []),
        ("adapter on", str(forecast.adapter))
        if forecast.adapter is not None
        else ("training", "all weights"),
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
        (f"  with {other.name}", f"{_size(other.peak_bytes)} ({other.note})")
        for other in forecast.alternatives
    ]
    time, price = forecast.time, forecast.price
    if time is not None:
        source = (
            "measured on real steps" if time.measured_by == "probe" else "roughly, from the device's speed"
        )
        spread = f"{_duration(time.seconds_low)} to {_duration(time.seconds_high)}"
        lines.append(("time", f"{_duration(time.seconds)} ({spread}), {source}"))
        lines.append(("speed", f"{time.tokens_per_second:,.0f} tokens/s"))
    if price is not None:
        lines.append(("price", f"{price.of_the_run:,.2f} at {price.per_hour:g} an hour"))
        per_hour = f"{price.tokens_per_hour:,} tokens, {price.epochs_per_hour:.2f} epochs"
        lines.append(("an hour buys", per_hour))
    return lines


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 100 else f"{minutes // 60}h{minutes % 60:02d}m"
