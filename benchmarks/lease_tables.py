"""Results of lease.py -> the table that it prints, and the section of docs/benchmarks.md in both languages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gpu_shapes import SHAPES
from gpu_tables import about_device, gpu_section, operations_per_token, tokens_per_second
from profile_kinds import NextTry, next_tries
from tables import gigabytes, table

Result = Mapping[str, Any]
NOT_MEASURED = {
    "en": "Nothing has been measured on a GPU yet: none was available.",
    "ko": "GPU에서는 아직 아무것도 측정하지 않았습니다. 쓸 수 있는 GPU가 없었습니다.",
}
LARGE = "llama-3-8b"


def read_result(file: Path) -> dict[str, Any] | None:
    """None if there is none."""
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def values_of(result: Result, name: str) -> Mapping[str, Any] | None:
    """What a job has measured; None if it has not."""
    entry = result["jobs"].get(name, {})
    return entry.get("values") if entry.get("state") == "done" else None


def trainings(result: Result) -> dict[str, Any]:
    """The measurements of training in the form of gpu.py's result."""
    entries = {name: entry for name, entry in result["jobs"].items() if "key" in entry}
    runs = [
        {"round": 1, **entry["key"], **entry["values"]}
        for entry in entries.values()
        if entry["state"] == "done"
    ]
    failures = [
        {"round": 1, **entry["key"], "error": entry["error"]}
        for entry in entries.values()
        if entry["state"] == "failed"
    ]
    left_out = [
        {**entry["key"], "why": entry["error"]} for entry in entries.values() if entry["state"] == "left out"
    ]
    used = {(run["shape"], run["workload"]) for run in runs}
    shapes = {
        shape: {
            **about,
            "workloads": {name: work for name, work in about["workloads"].items() if (shape, name) in used},
        }
        for shape, about in result["shapes"].items()
        if any(shape == where for where, _ in used)
    }
    return {**result, "shapes": shapes, "runs": runs, "failures": failures, "left_out": left_out}


# What one job says


def headline(result: Result, name: str) -> str:
    """The number that matters of a job, in a few words; why there is none."""
    entry = result["jobs"][name]
    values = entry.get("values")
    if entry["state"] != "done" or values is None:
        return str(entry.get("error", ""))
    if "key" in entry:
        speed = f"{tokens_per_second(values):,.0f} tokens/s, {share_of_rate(result, entry):.0%} of the matrix rate"
        return f"{speed}, {gigabytes(values['peak_memory_bytes'])}"
    kind = name.partition("/")[0]
    return HEADLINES.get(kind, lambda values: str(values["printed"][-1]) if values.get("printed") else "")(
        values
    )


def share_of_rate(result: Result, entry: Mapping[str, Any]) -> float:
    """The part of the rate of a large matrix product that a training reaches."""
    shape, key, values = result["shapes"][entry["key"]["shape"]], entry["key"], entry["values"]
    operations = operations_per_token(shape["model"], shape["workloads"][key["workload"]]["steps"])
    rate = sum(values["matrix_rates"]) / len(values["matrix_rates"])
    return tokens_per_second(values) * operations / rate


def equal_headline(values: Mapping[str, Any]) -> str:
    return f"the same bytes, also when killed after step {values['killed_after']}"


def profile_headline(values: Mapping[str, Any]) -> str:
    return (
        f"idle {values['idle_share']:.1%} of {values['step_seconds']:.2f} s, {values['launches']:,} launches, "
        f"{values['waits']} waits, {values['copies_to_host']} copies to the host"
    )


def forecast_headline(values: Mapping[str, Any]) -> str:
    memory, speed = (worst(values, *names) for names in FORECASTS)
    failed = sum("error" in pair for pair in values["pairs"])
    text = f"{len(values['pairs'])} pairs, off by at most {memory:.0%} (memory) and {speed:.0%} (time)"
    return text + (f"; failed: {failed}" if failed else "")


FORECASTS = (("forecast_bytes", "peak_bytes"), ("tokens_per_second", "forecast_tokens_per_second"))
"""What is forecast and what is measured, as quantities that grow with cost."""


def worst(values: Mapping[str, Any], forecast: str, measured: str) -> float:
    """The largest error of a forecast, as a part of what is measured."""
    pairs = [pair for pair in values["pairs"] if "error" not in pair]
    return max((abs(pair[forecast] / pair[measured] - 1) for pair in pairs), default=float("nan"))


def decoding_headline(values: Mapping[str, Any]) -> str:
    return "; ".join(map(decoded_rows, values["rows"]))


def decoded_rows(row: Mapping[str, Any]) -> str:
    """One number of rows. Results of an earlier checkout have no steps with fixed shapes."""
    text = (
        f"{row['rows']} rows: {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['tokens_per_second'] / row['most_tokens_per_second']:.0%} of what memory allows"
    )
    if "fixed_tokens_per_second" not in row:
        return text
    return text + (
        f", {row['fixed_tokens_per_second']:,.0f} with fixed shapes ({row['replayed_steps']} of "
        f"{row['fixed_steps']} steps replayed, {row['equal_answers']} equal answers)"
    )


def memory_end_headline(values: Mapping[str, Any]) -> str:
    return f"halved {len(values['said'])} times, losses equal to {values['loss_gap']:.0e}"


HEADLINES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "equal": equal_headline,
    "profile": profile_headline,
    "forecast": forecast_headline,
    "decoding": decoding_headline,
    "memory-end": memory_end_headline,
}


def summary_table(result: Result) -> str:
    """All jobs so far, for a terminal. Failures come with the end of their logs."""
    width = max((len(name) for name in result["jobs"]), default=0)
    lines = [
        f"{name:{width}}  {entry['state']:8}  {entry.get('seconds', 0):4.0f} s  {headline(result, name)}"
        for name, entry in result["jobs"].items()
    ]
    for name, values in profiles(result):
        lines += ["", f"{name}, what to try next:"] if "kinds" in values else []
        lines += [
            f"    at most {one.seconds / values['step_seconds']:5.1%} of the step  {one.what}"
            for one in next_two(result, values, "en")
        ]
    for name, entry in result["jobs"].items():
        if entry["state"] == "failed":
            lines += ["", f"{name} ended with:", *(f"    {line}" for line in entry.get("log", []))]
    reached = [f"{goal.words['en']}: {goal.shown} ({goal.verdict('en')})" for goal in goals(result)]
    return "\n".join([*lines, "", *reached])


# Goals


@dataclass(frozen=True)
class Goal:
    """`measured` is None where the job for it is not done."""

    words: Mapping[str, str]
    measured: float | None
    bound: float
    least: bool  # whether the measured number must be at least the bound, or at most
    form: str = "{:.2f}"

    @property
    def shown(self) -> str:
        return "-" if self.measured is None else self.form.format(self.measured)

    def verdict(self, language: str) -> str:
        english = language == "en"
        if self.measured is None:
            return "not measured" if english else "측정 안 함"
        met = self.measured >= self.bound if self.least else self.measured <= self.bound
        if met:
            return "met" if english else "달성"
        return "missed" if english else "미달"


def training(
    result: Result, workload: str, contender: str, quantization: str = "none"
) -> Mapping[str, Any] | None:
    return values_of(result, f"train/{LARGE}/{workload}/{quantization}/{contender}")


def speeds(result: Result, workload: str, quantization: str = "none") -> dict[str, float]:
    """Contender -> the tokens a second of its rounds on the large model, the median."""
    key = {"shape": LARGE, "workload": workload, "quantization": quantization}
    found: dict[str, list[float]] = {}
    for entry in result["jobs"].values():
        if entry["state"] == "done" and key.items() <= entry.get("key", {}).items():
            found.setdefault(entry["key"]["contender"], []).append(tokens_per_second(entry["values"]))
    return {contender: median(rounds) for contender, rounds in found.items()}


def fastest(result: Result, workload: str, library: str) -> float | None:
    """The tokens a second of a library's fastest setting; None if none was measured."""
    return max(
        (speed for name, speed in speeds(result, workload).items() if name.startswith(library)), default=None
    )


def goals(result: Result) -> list[Goal]:
    """What the project wants of one H200 or H100, and what was measured. None for a tiny shape on a CPU."""
    if result["gpu"] is None:
        return []

    def speed(workload: str, contender: str, quantization: str = "none") -> float | None:
        return speeds(result, workload, quantization).get(contender)

    def ratio(ours: float | None, theirs: float | None) -> float | None:
        return None if ours is None or theirs is None else ours / theirs

    packed_name = f"train/{LARGE}/packed/none/yeonma"
    packed = speed("packed", "yeonma")
    share = None if packed is None else share_of_rate(result, result["jobs"][packed_name])
    nf4 = training(result, "long", "yeonma-1-checkpointing", "nf4")
    forecasts = [
        values
        for name in result["jobs"]
        if name.startswith("forecast/") and (values := values_of(result, name)) is not None
    ]
    memory, time = (max((worst(values, *names) for values in forecasts), default=None) for names in FORECASTS)
    profile, decoding = values_of(result, "profile/packed"), values_of(result, "decoding")
    decoded = {
        row["rows"]: row["tokens_per_second"] / row["most_tokens_per_second"]
        for row in (decoding or {"rows": []})["rows"]
    }
    return [
        Goal(
            {
                "en": "tokens/s in NeMo AutoModel's setting, at least 14,500",
                "ko": "NeMo AutoModel 설정의 초당 토큰 수, 14,500 이상",
            },
            speed("nemo", "yeonma-2"),
            *(14_500, True, "{:,.0f}"),
        ),
        Goal(
            {
                "en": "packed: part of the matrix rate, at least 60%",
                "ko": "패킹: 행렬곱 속도의 비율, 60% 이상",
            },
            *(share, 0.6, True, "{:.0%}"),
        ),
        Goal(
            {
                "en": "packed: times TRL's fastest, at least 1.3",
                "ko": "패킹: TRL의 가장 빠른 설정의 배수, 1.3 이상",
            },
            *(ratio(packed, fastest(result, "packed", "trl")), 1.3, True),
        ),
        Goal(
            {
                "en": "packed: times Unsloth's fastest, at least 1.2",
                "ko": "패킹: Unsloth의 가장 빠른 설정의 배수, 1.2 이상",
            },
            *(ratio(packed, fastest(result, "packed", "unsloth")), 1.2, True),
        ),
        Goal(
            {"en": "fp8: times bfloat16, at least 1.5", "ko": "fp8: bfloat16의 배수, 1.5 이상"},
            *(ratio(speed("packed", "yeonma", "fp8"), packed), 1.5, True),
        ),
        Goal(
            {
                "en": "DPO: times TRL's fastest, at least 2.5",
                "ko": "DPO: TRL의 가장 빠른 설정의 배수, 2.5 이상",
            },
            *(ratio(speed("dpo", "yeonma"), fastest(result, "dpo", "trl")), 2.5, True),
        ),
        Goal(
            {
                "en": "nf4, one row of 2,080 tokens at once: GB, at most 9",
                "ko": "nf4, 2,080토큰 행을 한 번에 하나씩: GB, 9 이하",
            },
            *(None if nf4 is None else nf4["peak_memory_bytes"] / 1e9, 9.0, False),
        ),
        Goal(
            {
                "en": "forecast of memory: largest error, at most 5%",
                "ko": "메모리 예측의 가장 큰 오차, 5% 이하",
            },
            *(memory, 0.05, False, "{:.0%}"),
        ),
        Goal(
            {
                "en": "forecast of time: largest error, at most 15%",
                "ko": "시간 예측의 가장 큰 오차, 15% 이하",
            },
            *(time, 0.15, False, "{:.0%}"),
        ),
        Goal(
            {
                "en": "packed: idle part of a step, at most 5%",
                "ko": "패킹: 스텝에서 장치가 쉬는 비율, 5% 이하",
            },
            *(None if profile is None else profile["idle_share"], 0.05, False, "{:.1%}"),
        ),
        Goal(
            {
                "en": "decoding 64 rows: part of what memory allows, at least 50%",
                "ko": "64행 생성: 메모리가 허용하는 속도의 비율, 50% 이상",
            },
            *(decoded.get(64), 0.5, True, "{:.0%}"),
        ),
    ]


# The section of the docs

HEADS = {
    "en": {
        "goal": "goal",
        "measured": "measured",
        "verdict": "",
        "job": "job",
        "says": "result",
        "kernel": "kernel",
        "try": "what to try next",
        "most": "saves at most, of a step",
    },
    "ko": {
        "goal": "목표",
        "measured": "측정값",
        "verdict": "",
        "job": "작업",
        "says": "결과",
        "kernel": "커널",
        "try": "다음에 해 볼 것",
        "most": "스텝에서 줄일 수 있는 최대 비율",
    },
}
KERNELS_SHOWN = 12


def lease_section(result: Result | None, language: str = "en") -> str:
    """Goals and misses, all jobs, the table of the trainings and the profiles; without a result, that there is none."""
    if result is None:
        return NOT_MEASURED[language]
    heads, runs = HEADS[language], trainings(result)
    goal_rows = [(goal.words[language], goal.shown, goal.verdict(language)) for goal in goals(result)]
    blocks = [
        table({heads["goal"]: "---", heads["measured"]: "---:", heads["verdict"]: "---"}, goal_rows),
        table(
            {heads["job"]: "---", heads["says"]: "---"},
            ((f"`{name}`", cell(headline(result, name))) for name in result["jobs"]),
        ),
        gpu_section(runs) if runs["runs"] else about_device_alone(result),
        *profile_tables(result, language),
    ]
    return "\n\n".join(blocks)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def about_device_alone(result: Result) -> str:
    """The machine, where no training was measured and so no rate of it."""
    return about_device({**result, "runs": [{"matrix_rates": [0.0]}]}).partition("\n\n")[0]


def profiles(result: Result) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in result["jobs"]:
        values = values_of(result, name)
        if name.startswith("profile/") and values is not None:
            yield name, values


TRIES_SHOWN = 2


def next_two(result: Result, values: Mapping[str, Any], language: str) -> list[NextTry]:
    """The two things that a profile says to try next; none in the results of an earlier checkout, without kinds of
    kernels. Products need 4 operations a token for every parameter that is no embedding, and the head as many for
    every trained token."""
    if "kinds" not in values:
        return []
    shape, about = SHAPES[values["shape"]], result["shapes"][values["shape"]]["model"]
    head = shape["hidden_size"] * shape["vocab_size"]
    products = (
        about["non_embedding_parameters"] * values["step_tokens"] + head * values["step_trained_tokens"]
    )
    least = 4 * products / values["matrix_rate"]
    return next_tries(values, least, language)[:TRIES_SHOWN]


def profile_tables(result: Result, language: str) -> Iterator[str]:
    """For each profile, its kernels and what to try next."""
    heads = HEADS[language]
    for name, values in profiles(result):
        rows = [
            (
                f"`{cell(kernel['name'])}`",
                f"{kernel['calls']:,}",
                f"{kernel['seconds'] / values['busy_seconds']:.1%}",
            )
            for kernel in values["kernels"][:KERNELS_SHOWN]
        ]
        yield f"`{name}`:\n\n" + table({heads["kernel"]: "---", "×": "---:", "%": "---:"}, rows)
        tries = [
            (one.what, f"{one.seconds / values['step_seconds']:.1%}")
            for one in next_two(result, values, language)
        ]
        if tries:
            yield table({heads["try"]: "---", heads["most"]: "---:"}, tries)
