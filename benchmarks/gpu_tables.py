"""Results of gpu.py -> its table. Pure functions of what lies in results/gpu.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from tables import Ratio, beside_ours, gigabytes, largest_gap, matrix_rate, table

Run = Mapping[str, Any]
KEY = ("shape", "workload", "quantization")


@dataclass(frozen=True)
class Line:
    """One contender at one workload of one shape, over all rounds."""

    shape: str
    workload: str
    quantization: str
    contender: str
    tokens_per_second: float
    ratio: Ratio
    share: float  # of the device's matrix rate
    peak_memory_bytes: int
    loss: float
    loss_gap: float | None  # to ours, the largest of any step; None where the steps have other rows


def tokens_per_second(run: Run) -> float:
    """Without the first step, which is warm-up; a pass over the reference is shared out over all steps."""
    others = len(run["seconds"]) - 1
    reference = run["reference_seconds"] * others / len(run["seconds"])
    return sum(run["tokens"][1:]) / (sum(run["seconds"][1:]) + reference)


def operations_per_token(model: Mapping[str, Any], steps: list[Mapping[str, int]]) -> float:
    """Forward, and backward to the inputs: 4 a parameter that is no embedding. And causal attention: 2 products forward
    and 4 backward over half the pairs of tokens, 6 x width x n^2 a layer."""
    tokens, squares = (sum(step[name] for step in steps) for name in ("tokens", "squares"))
    attention = 6 * model["layers"] * model["attention_width"] * squares / tokens
    return float(4 * model["non_embedding_parameters"] + attention)


def lines(result: Mapping[str, Any]) -> list[Line]:
    """In the order in which they were first measured; those that were never measured beside ours are left out."""
    rate = matrix_rate(result)
    result_lines = []
    for *where, contender in dict.fromkeys(
        (*(run[name] for name in KEY), run["contender"]) for run in result["runs"]
    ):
        both = beside_ours(result, contender, **dict(zip(KEY, where, strict=True)))
        if not both:
            continue
        shape, workload, quantization = where
        prepared = result["shapes"][shape]
        operations = operations_per_token(prepared["model"], prepared["workloads"][workload]["steps"])
        speed = median(tokens_per_second(theirs) for theirs, _ in both)
        result_lines.append(
            Line(
                shape=shape,
                workload=workload,
                quantization=quantization,
                contender=contender,
                tokens_per_second=speed,
                ratio=Ratio.of(both, tokens_per_second),
                share=speed * operations / rate,
                peak_memory_bytes=int(median(theirs["peak_memory_bytes"] for theirs, _ in both)),
                loss=median(sum(theirs["losses"]) / len(theirs["losses"]) for theirs, _ in both),
                loss_gap=largest_gap(both),
            )
        )
    return result_lines


def gpu_section(result: Mapping[str, Any]) -> str:
    """The words and the table."""
    columns = dict.fromkeys(["shape", "workload", "base", "contender"], "---")
    numbers = ["tokens/s", "Yeonma is", "of matrix rate", "peak memory", "loss", "gap"]
    columns |= dict.fromkeys(numbers, "---:")
    rows = []
    for line in lines(result):
        label = result["contenders"][f"{line.workload}/{line.contender}"]
        mine = line.contender == result["ours"]
        cells = (
            line.shape,
            line.workload,
            result["settings"]["dtype"] if line.quantization == "none" else line.quantization,
            f"**{label}**" if mine else label,
            f"{line.tokens_per_second:.0f}",
            "" if mine else str(line.ratio),
            f"{line.share:.0%}",
            gigabytes(line.peak_memory_bytes),
            f"{line.loss:.4f}",
            "" if mine else "other rows a step" if line.loss_gap is None else f"{line.loss_gap:.0e}",
        )
        rows.append(cells)
    works = [f"- `{name}`: {about}" for name, about in dict(described_workloads(result)).items()]
    failed = [
        f"- {failure['shape']}, {failure['workload']}, {failure['contender']}: `{failure['error']}`"
        for failure in result["failures"]
    ]
    left = sorted({f"{entry['contender']}: {entry['why']}" for entry in result["left_out"]})
    blocks = [about_device(result), "\n".join(works), table(columns, rows)]
    if failed:
        blocks.append("Failed:\n\n" + "\n".join(failed))
    if left:
        blocks.append(f"Not measured: {'; '.join(left)}.")
    return "\n\n".join(blocks)


def described_workloads(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, f"{work['about']}; {work['batch']} a step, {len(work['steps'])} steps, the first not timed")
        for prepared in result["shapes"].values()
        for name, work in prepared["workloads"].items()
    ]


def about_device(result: Mapping[str, Any]) -> str:
    gpu, machine = result["gpu"], result["machine"]
    where = f"{machine['cpu']}, cores: {machine['cores']}"
    if gpu is not None:
        where = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, driver {gpu['driver']}, CUDA {gpu['cuda']}"
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    for library, own in result.get("own_versions", {}).items():
        packages += f"; {library} in an environment of its own: "
        packages += ", ".join(f"{name} {number}" for name, number in own.items() if number)
    rate = matrix_rate(result)
    return (
        f"{result['date']}, {where}; {packages}.\n`{result['command']}`\n\n"
        f"Random weights, LoRA r={result['settings']['lora_r']} on all linear layers, {result['settings']['dtype']}. "
        f"Matrix rate: {rate / 1e12:.2f} TFLOP/s, the median of one large product before and after each run."
    )
