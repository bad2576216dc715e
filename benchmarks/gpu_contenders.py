"""Who is measured by gpu.py; gpu_measure.py is one measurement."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contenders import TRL, YEONMA
from gpu_shapes import LORA_R, SEED
from gpu_workloads import CUTOFF_LEN
from machine import own_bytes
from workloads import HERE

TRANSFORMERS, TRL_DPO = "transformers Trainer", "TRL DPOTrainer"
UNSLOTH, FACTORY = "Unsloth", "LLaMA-Factory"
LEARNING_RATE = {False: 2e-4, True: 1e-5}  # by whether a workload has pairs
BETA = 0.1
NEEDS = {TRL: "trl", TRL_DPO: "trl", UNSLOTH: "unsloth", FACTORY: "llamafactory"}


@dataclass(frozen=True)
class Contender:
    """`micro_batch`: rows or pairs at once; None for as many as fit, which Yeonma finds out, or for packing."""

    library: str
    micro_batch: int | None
    checkpointing: bool | None = False  # None: as the library decides
    packed: bool = False  # rows packed into sequences as long as the workload says
    fused: bool = False  # liger-kernel's layers; TRL's loss keeps no logits with or without it

    @property
    def label(self) -> str:
        parts = [self.library]
        if self.micro_batch:
            parts.append(f"micro-batch {self.micro_batch}")
        parts += [word for word, on in (("packing", self.packed), ("liger", self.fused)) if on]
        return ", ".join([*parts, *(["checkpointing"] if self.checkpointing else [])])


OURS = "yeonma"
SFT: dict[str, Contender] = {
    OURS: Contender(YEONMA, None, checkpointing=None),
    "yeonma-4": Contender(YEONMA, 4),
    "yeonma-2": Contender(YEONMA, 2),
    "yeonma-1-checkpointing": Contender(YEONMA, 1, checkpointing=True),
    "transformers-4": Contender(TRANSFORMERS, 4, checkpointing=True),
    "transformers-1": Contender(TRANSFORMERS, 1),
    "trl-4": Contender(TRL, 4, checkpointing=True),
    "trl-1": Contender(TRL, 1),
    "trl-packing": Contender(TRL, None, checkpointing=True, packed=True),
    "trl-packing-liger": Contender(TRL, None, checkpointing=True, packed=True, fused=True),
    "trl-packing-liger-kept": Contender(TRL, None, packed=True, fused=True),
    "unsloth-4": Contender(UNSLOTH, 4, checkpointing=True),
    "unsloth-packing": Contender(UNSLOTH, None, checkpointing=True, packed=True),
    "factory-4": Contender(FACTORY, 4, checkpointing=True),
    "factory-4-liger": Contender(FACTORY, 4, checkpointing=True, fused=True),
}
DPO: dict[str, Contender] = {
    OURS: Contender(YEONMA, None, checkpointing=None),
    "yeonma-2": Contender(YEONMA, 2),
    "trl-1": Contender(TRL_DPO, 1),
    "trl-2": Contender(TRL_DPO, 2, checkpointing=True),
    "trl-4": Contender(TRL_DPO, 4, checkpointing=True),
    "trl-4-liger": Contender(TRL_DPO, 4, checkpointing=True, fused=True),
    "unsloth-4": Contender(UNSLOTH, 4, checkpointing=True),
}


def contenders(pairs: bool) -> dict[str, Contender]:
    return DPO if pairs else SFT


def installed(package: str, python: str | None) -> bool:
    """Whether this Python, or the one at the path given, finds the package."""
    if python is None:
        return find_spec(package) is not None
    script = "import sys, importlib.util as u; sys.exit(u.find_spec(sys.argv[1]) is None)"
    return subprocess.run([python, "-c", script, package], check=False).returncode == 0


def versions_of(python: str, packages: Sequence[str], folder: Path | None = None) -> dict[str, str | None]:
    """As machine.versions has them, in the environment of the Python at the path given, with the packages of `folder`
    before it."""
    script = "import json, sys, machine; print(json.dumps(machine.versions(sys.argv[1:])))"
    own = [path for path in (str(folder or ""), os.environ.get("PYTHONPATH", "")) if path]
    done = subprocess.run(
        [python, "-c", script, *packages],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(own)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def lacking(
    contender: Contender, quantization: str, workload: dict[str, Any], python: str | None = None
) -> str:
    """Why a contender is not measured here, or in the Python of its own; empty where it is."""
    needed = [NEEDS.get(contender.library), "liger_kernel" if contender.fused else None]
    for package in needed:
        if package and not installed(package, python):
            return f"{package} is not installed"
    if contender.packed and not workload["packed"]:
        return "packing is measured on the packed workload alone"
    if quantization == "nf4" and not installed("bitsandbytes", python):
        return "bitsandbytes is not installed"
    if quantization in ("none", "nf4") or contender.library == YEONMA:
        return ""
    return f"it has no {quantization} here"


@dataclass(frozen=True)
class Job:
    folder: Path
    workload: str
    about: dict[str, Any]  # of the workload, as prepared.json has it
    quantization: str
    device: str
    dtype: str

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def start(self) -> Path:
        return self.folder / str(self.about["start"])

    @property
    def examples(self) -> Any:
        return json.loads((self.folder / f"{self.workload}.json").read_text("utf-8"))


def run_settings(
    prepared: Path, workload: str, output: Path, *, pairs: bool, device: str, dtype: str
) -> dict[str, Any]:
    """Settings of every run of ours on a prepared model and its rows. All else is the default or the measurement's."""
    return {
        "base_model": prepared / "model",
        "data_path": prepared / f"{workload}.jsonl",
        "cache_dir": prepared / "cache",
        "output_dir": output,
        "device": device,
        "dtype": dtype,
        "cutoff_len": CUTOFF_LEN,
        "lora_r": LORA_R,
        "learning_rate": LEARNING_RATE[pairs],
        "seed": SEED,
        **({"loss": "sigmoid", "beta": BETA} if pairs else {}),
    }


@dataclass(frozen=True)
class Measured:
    """Lists have a number a step. `tokens` are the examples' own, an answer's and its prompt's each time."""

    seconds: list[float]
    tokens: list[int]
    losses: list[float]
    trained_tokens: list[int]
    reference_seconds: float
    peak_memory_bytes: int
    matrix_rates: tuple[float, float] = (0.0, 0.0)  # before and after, operations a second


def peak_memory(job: Job) -> int:
    """The most memory this process has used so far: tensors on the GPU, else resident memory."""
    if job.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return own_bytes("VmHWM")
