"""What lease.py does on a GPU, in the order of worth. On the CPU, with `tiny`, the same jobs on a tiny shape."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from gpu_contenders import NEEDS, UNSLOTH, contenders, installed
from gpu_workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
LARGE, SMALL, LITTLE, TINY = "llama-3-8b", "qwen3-0.6b", "little", "tiny"
RECURRENT, LITTLE_RECURRENT, TINY_RECURRENT = "qwen3.5-like", "little-recurrent", "tiny-recurrent"
STEPS = {False: 12, True: 4}
"""Of a measurement, by whether it is tiny. A workload may have fewer where a step takes long."""
PREPARED: Mapping[str, tuple[str, ...]] = {
    LARGE: ("nemo", "nemo-plain", "packed", "long", "dpo"),
    SMALL: ("long", "alpaca", "dpo"),
    LITTLE: ("alpaca", "dpo"),
    RECURRENT: ("alpaca",),
    LITTLE_RECURRENT: ("alpaca",),
    TINY_RECURRENT: ("alpaca",),
    TINY: tuple(WORKLOADS),
}
"""Shape -> the workloads whose rows are made with it."""
PREPARING_SECONDS = {
    LARGE: 90.0,
    SMALL: 40.0,
    LITTLE: 30.0,
    RECURRENT: 45.0,
    LITTLE_RECURRENT: 30.0,
    TINY_RECURRENT: 120.0,
    TINY: 120.0,
}


@dataclass(frozen=True)
class Job:
    """`seconds`: what it is expected to take on an H200, its start included; it begins only if so many are left.
    `limit_seconds`: it is ended then, with all processes that it has started."""

    name: str
    about: str
    seconds: float
    limit_seconds: float
    command: tuple[str, ...] | None = None  # a command, or else
    script: str | None = None  # a script of this folder that answers a job file
    settings: Mapping[str, Any] = field(default_factory=dict)
    shape: str | None = None  # a model that is prepared before
    contender: str | None = None  # of gpu_measure.py, at the workload of `settings`
    alongside: bool = False  # it times nothing, so it runs beside its neighbours
    needs: tuple[str, ...] = ()  # packages
    needs_gpu: str = ""  # why the CPU cannot do it
    own_packages: bool = False  # Unsloth's


def gpu_test_files() -> list[str]:
    """The test files with tests marked `gpu`. Others are not even imported: they may need what is not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [
        file.relative_to(ROOT).as_posix() for file in files if "@pytest.mark.gpu" in file.read_text("utf-8")
    ]


def jobs(*, tiny: bool) -> list[Job]:
    """All jobs, the most useful first: what is right, then NeMo's setting and where a step's time goes."""
    first, *others = _trainings()
    profile, *more_profiles = _profiles()
    main = [
        *_checks(tiny),
        first,
        profile,
        *others,
        *more_profiles,
        *_forecasts(tiny),
        *_others(tiny),
        *_more_trainings(),
        *_more_rounds(tiny),
    ]
    return [_on_the_cpu(job) for job in main] if tiny else main


def _on_the_cpu(job: Job) -> Job:
    """With a tiny shape. What has processes of its own runs alone: a CPU has few cores."""
    recurrent = job.shape in (RECURRENT, LITTLE_RECURRENT)
    return replace(
        job,
        shape=None if job.shape is None else TINY_RECURRENT if recurrent else TINY,
        seconds=1.0,
        limit_seconds=max(600.0, job.limit_seconds),
        alongside=job.alongside and job.shape is None,
    )


def _checks(tiny: bool) -> list[Job]:
    workers = "2" if tiny else "8"
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers, "-m", "gpu", *gpu_test_files())
    found = [
        Job(
            "doctor",
            "what is installed, and what a run here would use",
            *(15, 60),
            command=(sys.executable, "-m", "yeonma", "doctor", "--hub", "false"),
            alongside=True,
        ),
        Job(
            "tests",
            "the tests marked `gpu`, eight at a time",
            *(90, 120),
            command=(sys.executable, *tests),
            alongside=True,
            needs=("pytest", "xdist", "hypothesis"),
        ),
    ]
    found += [
        _equality("sft", {"torch_compile": "false"}),
        _equality("compiled", {"torch_compile": "true"}, seconds=90),
        _equality("dpo", {}),
        _equality("nf4", {"quantization": "nf4"}, needs=("bitsandbytes",)),
    ]
    return found


def _equality(
    kind: str,
    settings: Mapping[str, Any],
    *,
    seconds: float = 60,
    shape: str = LITTLE,
    needs: tuple[str, ...] = (),
) -> Job:
    workload = "dpo" if kind == "dpo" else "alpaca"
    given = {"workload": workload, "preference": workload == "dpo", "batch": 8, "settings": settings}
    return Job(
        f"equal/{kind}",
        f"equal bytes: the same run twice, and once killed and gone on ({kind})",
        *(seconds, 150),
        script="one_equality.py",
        settings=given,
        shape=shape,
        alongside=True,
        needs=needs,
    )


def _training(
    workload: str,
    contender: str,
    *,
    seconds: float,
    shape: str = LARGE,
    quantization: str = "none",
    number: int = 1,
) -> Job:
    """`number`: of the round."""
    who = contenders(WORKLOADS[workload].pairs)[contender]
    needs = [NEEDS[who.library]] if who.library in NEEDS else []
    needs += ["liger_kernel"] if who.fused else []
    needs += ["bitsandbytes"] if quantization == "nf4" else []
    needs_gpu = "liger-kernel runs on a GPU alone" if who.fused else ""
    if who.library == UNSLOTH and who.packed:
        needs_gpu = "Unsloth does not pack on the CPU"
    base = "" if quantization == "none" else f", {quantization}"
    again = {} if number == 1 else {"round": number}
    return Job(
        f"train/{shape}/{workload}/{quantization}/{contender}{f'/round-{number}' if again else ''}",
        f"{who.label}{base}: {workload} on {shape}{f', round {number}' if again else ''}",
        *(seconds, 1.6 * seconds + 30),
        script="gpu_measure.py",
        settings={"workload": workload, "quantization": quantization, **again},
        shape=shape,
        contender=contender,
        needs=tuple(needs),
        needs_gpu=needs_gpu,
        own_packages=who.library == UNSLOTH,
    )


def _trainings() -> list[Job]:
    return [
        _training("nemo", "yeonma-2", seconds=105),
        _training("packed", "yeonma", seconds=70),
        _training("packed", "trl-packing-liger", seconds=100),
        _training("packed", "unsloth-packing", seconds=110),
        _training("dpo", "yeonma", seconds=70),
        _training("dpo", "trl-4-liger", seconds=120),
        _training("dpo", "unsloth-4", seconds=120),
        _training("long", "yeonma", seconds=70),
        _training("long", "trl-4", seconds=85),
        _training("long", "unsloth-4", seconds=85),
        _training("long", "transformers-4", seconds=85),
        _training("nemo-plain", "yeonma-2", seconds=95),
        _training("packed", "yeonma", quantization="fp8", seconds=70),
        _training("packed", "yeonma", quantization="nf4", seconds=90),
        _training("long", "yeonma-1-checkpointing", quantization="nf4", seconds=100),
    ]


def _more_trainings() -> list[Job]:
    """Other settings of the libraries compared with, of which the fastest counts."""
    return [
        _training("packed", "trl-packing", seconds=110),
        _training("packed", "trl-packing-liger-kept", seconds=85),
        _training("packed", "unsloth-4", seconds=130),
        _training("packed", "transformers-4", seconds=130),
        _training("dpo", "trl-2", seconds=130),
        _training("dpo", "trl-1", seconds=130),
        _training("long", "trl-1", seconds=75),
        _training("packed", "unsloth-packing", quantization="nf4", seconds=120),
    ]


def _more_rounds(tiny: bool) -> list[Job]:
    """The second and third round of the comparisons that count, where there is time."""
    compared = [
        ("packed", "yeonma", 70.0),
        ("packed", "trl-packing-liger", 100.0),
        ("packed", "unsloth-packing", 110.0),
        ("dpo", "yeonma", 70.0),
        ("dpo", "trl-4-liger", 120.0),
        ("long", "yeonma", 70.0),
        ("long", "trl-4", 85.0),
    ]
    return [
        _training(workload, contender, seconds=seconds, number=number)
        for number in ((2,) if tiny else (2, 3))
        for workload, contender, seconds in (compared[:1] if tiny else compared)
    ]


def _profiles() -> list[Job]:
    return [
        Job(
            f"profile/{workload}",
            f"one step of `{workload}` under the profiler, and what it says to try next",
            *(seconds, 110),
            script="one_profile.py",
            settings={"workload": workload, "quantization": "none"},
            shape=LARGE,
            contender=contender,
        )
        for workload, contender, seconds in (("packed", "yeonma", 45), ("nemo-plain", "yeonma-2", 85))
    ]


def _forecasts(tiny: bool) -> list[Job]:
    """Twenty pairs of a shape and settings."""
    small = [
        {
            "workload": workload,
            "settings": {"micro_batch_size": micro, "gradient_checkpointing": level, "batch_size": 16},
        }
        for workload, micro, level in (
            *product(("long",), (2, 8), ("false", "selective", "true")),
            *product(("alpaca",), (8, 16), ("false",)),
            ("dpo", 2, "false"),
            ("dpo", 8, "true"),
        )
    ]
    large = [
        {
            "workload": workload,
            "settings": {
                "micro_batch_size": micro,
                "gradient_checkpointing": level,
                "batch_size": 4,
                **({} if quantization == "none" else {"quantization": quantization}),
            },
        }
        for workload, micro, level, quantization in (
            *product(("long",), (1, 4), ("false", "true"), ("none",)),
            *product(("long",), (2,), ("false", "true"), ("fp8", "nf4")),
            ("packed", 4, "false", "none"),
            ("dpo", 2, "false", "none"),
        )
    ]
    by_shape = {SMALL: small[:2] if tiny else small, LARGE: large[:1] if tiny else large}
    return [
        Job(
            f"forecast/{shape}",
            f"the forecast of memory and time beside {len(pairs)} runs",
            *seconds,
            script="one_forecast.py",
            settings={"pairs": pairs},
            shape=shape,
            needs=("bitsandbytes",) if shape == LARGE and not tiny else (),
        )
        for (shape, pairs), seconds in zip(by_shape.items(), ((100, 180), (150, 240)), strict=True)
    ]


def _others(tiny: bool) -> list[Job]:
    rows, tokens = ([1, 4], 8) if tiny else ([1, 16, 64, 256], 64)
    return [
        Job(
            "decoding",
            "new tokens a second, beside what the memory's bandwidth allows",
            *(70, 150),
            script="one_decoding.py",
            settings={"rows": rows, "prompt_tokens": 16 if tiny else 128, "new_tokens": tokens},
            shape=LARGE,
        ),
        Job(
            "memory-end",
            "a run whose memory ends goes on with smaller micro-batches",
            *(50, 120),
            script="one_memory_end.py",
            settings={"workload": "long", "batch": 8 if tiny else 16},
            shape=SMALL,
        ),
        _equality("recurrent", {"torch_compile": "false"}, shape=LITTLE_RECURRENT),
        _training("alpaca", "yeonma", shape=RECURRENT, seconds=60),
        _training("alpaca", "transformers-4", shape=RECURRENT, seconds=90),
    ]


def lacking(job: Job, *, tiny: bool, own_packages: Path | None) -> str:
    """Why a job is not done here; empty where it is."""
    if tiny and job.needs_gpu:
        return job.needs_gpu
    for package in job.needs:
        apart = job.own_packages and own_packages is not None and (own_packages / package).is_dir()
        if not apart and not installed(package, None):
            return f"{package} is not installed"
    return ""
