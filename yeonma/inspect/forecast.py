"""A forecast of one process of a run: parameters, memory by part, time and price, as numbers and as text.

`yeonma.inspect.estimate` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from yeonma.config.gpus import Gpu
from yeonma.durations import estimated
from yeonma.messages import counted, later, tr
from yeonma.model.targets import Coverage, PartCoverage
from yeonma.run_folder.progress import FORWARD_SHARE, CardWork
from yeonma.run_folder.units import counted_units
from yeonma.train.memory_parts import Memory

# The fraction of the rate of a large matrix product that a run reaches: lowest, usual, highest. CPU:
# docs/benchmarks.md, with head, adapter and attention counted as in the trace; SmolLM2-135M reached 0.66 on one core,
# processor time against processor time. GPU: not measured.
EFFICIENCY = {"cpu": (0.4, 0.6, 0.7), "cuda": (0.15, 0.35, 0.6)}

DATA_SHEET_PARTS = (0.15, 0.35, 0.43)
"""The assumed part of a data sheet's rate: lowest, usual, highest. NVIDIA publishes 402 and 423 TFLOP/s for LoRA on one
H100 with rows of 4,096 tokens (Llama 3 8B and Qwen2.5 7B, performance summary of NeMo AutoModel), which is 41% and 43%
of its 989. Rows of usual lengths reach less."""

SECONDS_PER_OPERATOR = 8e-6
"""The assumed time in which PyTorch calls an operator from Python, which bounds the speed of small models on a GPU."""


WORDS_OF_MEMORY = {
    "process": later("process"),
    "weights": later("weights"),
    "lora": later("lora"),
    "gradients": later("gradients"),
    "optimizer": later("optimizer"),
    "activations": later("activations"),
    "logits": later("logits"),
    "workspace": later("workspace"),
    "routines": later("routines"),
    "copies": later("copies"),
    "gathered": later("gathered"),
}
"""The parts of memory."""


@dataclass(frozen=True)
class Alternative:
    """The peak memory of the run with other settings."""

    name: str
    """`micro_batch_size 1`, or several of these with commas between them."""
    peak_bytes: int
    note: str
    same_result: bool = False
    """Whether the run has the same result, up to rounding."""

    @property
    def changed(self) -> frozenset[str]:
        """The names of the settings that differ."""
        return frozenset(setting.partition(" ")[0] for setting in self.name.split(", "))

    @property
    def options(self) -> str:
        """For a command line: `--micro_batch_size 1 --gradient_checkpointing true`."""
        return " ".join(f"--{setting}" for setting in self.name.split(", "))


@dataclass(frozen=True)
class Time:
    """Time of the training steps and of the answers at evaluations, without loading, other evaluation and
    checkpoints."""

    tokens_per_second: float
    """A token that several examples share counts once per example."""
    seconds: float
    seconds_low: float
    seconds_high: float
    measured_by: Literal["rate", "probe", "data sheet"]
    answer_seconds: float = 0.0
    """Of `seconds`, those of the answers at evaluations."""


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
    operator_calls: float
    """Calls of PyTorch's operators of all steps in one process."""
    weight_bytes_read: float
    """Bytes of weights that one process reads in all steps: those of every micro-batch, forward and backward."""
    heaviest_units: int
    """Examples, or pairs, in the heaviest micro-batch."""
    heaviest_tokens: int
    """Tokens of the heaviest micro-batch. Shared tokens count once."""
    memory: Memory
    alternatives: tuple[Alternative, ...]
    """Settings that may need less memory, each changed alone."""
    combinations: tuple[Alternative, ...]
    """Several of them together; empty if the run fits."""
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


def timed_by_data_sheet(forecast: Forecast, gpu: Gpu, price: float | None = None) -> Forecast:
    """The forecast with a rough time on a GPU that is not here, from its data sheet: that of the products at an assumed
    part of its rate, of reading the weights at its bandwidth, or of calling the operators, whichever is the longest.
    Without a time if the data sheet has no rate for the run's number format."""
    if gpu.flops_per_second is None or gpu.bytes_per_second is None or forecast.dtype == "float32":
        return forecast
    least = max(
        forecast.weight_bytes_read / gpu.bytes_per_second, forecast.operator_calls * SECONDS_PER_OPERATOR
    )
    low, usual, high = (
        max(forecast.operations / (part * gpu.flops_per_second), least) for part in DATA_SHEET_PARTS
    )
    time = Time(forecast.tokens / usual, usual, seconds_low=high, seconds_high=low, measured_by="data sheet")
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


def with_answers(forecast: Forecast, work: CardWork | None, evaluations: float) -> Forecast:
    """The forecast whose time counts the answers at so many evaluations as well."""
    time = forecast.time
    if time is None or work is None or not forecast.tokens:
        return forecast

    def answering(seconds: float) -> float:
        return evaluations * work.seconds(FORWARD_SHARE * seconds / forecast.tokens)

    longer = replace(
        time,
        seconds=time.seconds + answering(time.seconds),
        seconds_low=time.seconds_low + answering(time.seconds_low),
        seconds_high=time.seconds_high + answering(time.seconds_high),
        answer_seconds=answering(time.seconds),
    )
    return _with_time(forecast, longer, None if forecast.price is None else forecast.price.per_hour)


def forecast_dict(forecast: Forecast) -> dict[str, Any]:
    """The forecast for JSON, with the sums `training` and `peak` of memory."""
    values = asdict(forecast)
    values["memory"] |= {"training": forecast.memory.training, "peak": forecast.memory.peak}
    return values


def forecast_of(values: Mapping[str, Any]) -> Forecast:
    """The forecast from a `forecast_dict`, without time and price. Raises KeyError or TypeError for other values."""
    memory = {name: value for name, value in values["memory"].items() if name not in ("training", "peak")}
    alternatives, combinations = (
        tuple(Alternative(**fields) for fields in values[name]) for name in ("alternatives", "combinations")
    )
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
    parts = {"memory": Memory(**memory), "alternatives": alternatives, "combinations": combinations}
    return Forecast(**{**values, **parts, "adapter": adapter, "time": None, "price": None})


def forecast_lines(
    forecast: Forecast, units: str = "examples", savings: Sequence[Alternative] = ()
) -> list[tuple[str, str]]:
    """(name, value) lines for display. `units`: what a step consists of, such as `pairs`. `savings`: the settings that
    are named beside the parts of memory."""
    lines = [
        (
            tr("parameters"),
            tr(
                "{parameters_trained:,} trained, {parameters_frozen:,} frozen",
                parameters_trained=forecast.parameters_trained,
                parameters_frozen=forecast.parameters_frozen,
            ),
        ),
        *([(tr("base weights"), forecast.published)] if forecast.published else []),
        (tr("adapter on"), str(forecast.adapter))
        if forecast.adapter is not None
        else (tr("training"), tr("all weights")),
        (
            tr("steps"),
            tr(
                "{steps:,} ({epochs:.2f} epochs, {tokens:,} tokens)",
                steps=forecast.steps,
                epochs=forecast.epochs,
                tokens=forecast.tokens,
            ),
        ),
        (
            tr("heaviest micro-batch"),
            f"{counted_units(forecast.heaviest_units, units)}, {counted(forecast.heaviest_tokens, 'token')}",
        ),
        (
            tr("peak memory"),
            tr(
                "{size} on {device}, {dtype}",
                size=size(forecast.memory.peak),
                device=forecast.device,
                dtype=forecast.dtype,
            ),
        ),
    ]
    parts = {name: value for name, value in asdict(forecast.memory).items() if name != "loading" and value}
    lines += [(f"  {tr(WORDS_OF_MEMORY[name])}", size(value)) for name, value in parts.items()]
    if forecast.memory.loading > forecast.memory.training:
        lines.append((tr("  while loading"), size(forecast.memory.loading)))
    lines += [
        (tr("  with {settings}", settings=other.name), f"{size(other.peak_bytes)} ({other.note})")
        for other in savings
    ]
    time, price = forecast.time, forecast.price
    if time is not None:
        source = {
            "probe": tr("measured on real steps"),
            "rate": tr("roughly, from the device's speed"),
            "data sheet": tr(
                "from the data sheet, at an assumed {part:.0%} of its rate at most", part=DATA_SHEET_PARTS[1]
            ),
        }[time.measured_by]
        spread = tr(
            "{time} ({least} to {most}), {source}",
            time=estimated(time.seconds),
            least=estimated(time.seconds_low),
            most=estimated(time.seconds_high),
            source=source,
        )
        lines.append((tr("time"), spread))
        if time.answer_seconds:
            lines.append((tr("  of it answers"), estimated(time.answer_seconds)))
        lines.append((tr("speed"), tr("{rate:,.0f} tokens/s", rate=time.tokens_per_second)))
    if price is not None:
        lines.append(
            (
                tr("price"),
                tr(
                    "{of_the_run:,.2f} at {per_hour:g} an hour",
                    of_the_run=price.of_the_run,
                    per_hour=price.per_hour,
                ),
            )
        )
        per_hour = tr(
            "{tokens_per_hour:,} tokens, {epochs_per_hour:.2f} epochs",
            tokens_per_hour=price.tokens_per_hour,
            epochs_per_hour=price.epochs_per_hour,
        )
        lines.append((tr("an hour buys"), per_hour))
    return lines


def size(size_bytes: float) -> str:
    """`13.20 GB` or `312 MB`."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
