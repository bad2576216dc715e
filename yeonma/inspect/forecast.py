"""What a run will need, in numbers: parameters, memory by part, time, money; and those numbers in words.

`estimate` makes them. All of it is for one process of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

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
    gathered: int = 0
    """Of weights that are sharded, what is whole at a time: the layer that runs, and the next."""

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
    processes: int
    tokens: int
    """Examples' own tokens over all steps."""
    tokens_per_epoch: int
    operations: float
    """Floating point operations of all steps, of one process, as if every token cost what the heaviest micro-batch's
    does."""
    heaviest_units: int
    """Examples, or pairs, of the heaviest micro-batch."""
    heaviest_tokens: int
    """Tokens of the heaviest micro-batch, shared ones counted once."""
    memory: Memory
    alternatives: tuple[Alternative, ...]
    time: Time | None
    price: Price | None


def timed_by_rate(forecast: Forecast, flops_per_second: float, price: float | None = None) -> Forecast:
    """With a rough estimate of the time, from the device's rate of products. `price`: of an hour of one device."""
    shares = EFFICIENCY[forecast.device.partition(":")[0]]
    low, usual, high = (forecast.operations / (share * flops_per_second) for share in shares)
    time = Time(forecast.tokens / usual, usual, seconds_low=high, seconds_high=low, measured_by="rate")
    return _with_time(forecast, time, price)


def timed_by_probe(forecast: Forecast, tokens_per_second: float, price: float | None = None) -> Forecast:
    """The same from the tokens a second of real steps."""
    seconds = forecast.tokens / tokens_per_second
    time = Time(tokens_per_second, seconds, 0.9 * seconds, 1.1 * seconds, "probe")
    return _with_time(forecast, time, price)


def _with_time(forecast: Forecast, time: Time, price: float | None) -> Forecast:
    if price is None:
        return replace(forecast, time=time, price=None)
    per_hour = price * forecast.processes
    tokens_per_hour = time.tokens_per_second * 3600
    bought = Price(
        per_hour=price,
        of_the_run=per_hour * time.seconds / 3600,
        tokens_per_hour=int(tokens_per_hour),
        epochs_per_hour=tokens_per_hour / forecast.tokens_per_epoch,
    )
    return replace(forecast, time=time, price=bought)


def forecast_dict(forecast: Forecast) -> dict[str, Any]:
    """For JSON: the fields by their names, and the two sums of memory."""
    found = asdict(forecast)
    found["memory"] |= {"training": forecast.memory.training, "peak": forecast.memory.peak}
    return found


def forecast_of(values: Mapping[str, Any]) -> Forecast:
    """What `forecast_dict` gave, but for time and price. Raises KeyError or TypeError for anything else."""
    memory = {name: value for name, value in values["memory"].items() if name not in ("training", "peak")}
    alternatives = tuple(Alternative(**each) for each in values["alternatives"])
    parts = {"memory": Memory(**memory), "alternatives": alternatives, "time": None, "price": None}
    return Forecast(**{**values, **parts})


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
