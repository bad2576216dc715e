"""Trains a tiny model by the files under recipes/, on CPU processes: tasks of Slurm, and a machine that goes away."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.recipes import FIRST_HOST, SLURM_VARIABLES, Place, place_with
from tests.runs import arguments, articles, model_folder, read_lines, write_jsonl

pytestmark = pytest.mark.slow

TWO_TASKS = """#!/bin/bash
# as srun: the command once for each task
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do SLURM_PROCID=$task "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=1; done
exit $status
"""
TORCHRUN = f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
SETTINGS: dict[str, object] = {
    "batch_size": 4, "template": "title", "cutoff_len": 128, "save_steps": 2, "max_steps": 12, "card_rows": 0,
    "lora_dropout": 0.1,
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_with(tmp_path / "clone", {"srun": TWO_TASKS, "scontrol": FIRST_HOST, "torchrun": TORCHRUN})


def killed_when(
    place: Place, command: list[str], variables: dict[str, str], is_time: Callable[[], bool]
) -> None:
    """Starts the command and kills all of its processes."""
    process = subprocess.Popen(
        command,
        cwd=place.folder,
        env=place.environment(variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 240
    while not is_time() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    alive = process.poll() is None
    for child in [*_below(process.pid), process.pid]:
        with suppress(ProcessLookupError):  # it has ended since
            os.kill(child, signal.SIGKILL)
    process.wait()
    assert alive, "it had ended before it was killed"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def _below(pid: int) -> list[int]:
    """The processes that a process started, and those that these started."""
    children = [
        int(one)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for one in (thread / "children").read_text().split()
    ]
    return [below for child in children for below in (child, *_below(child))]


def variables_of(place: Place, output: Path) -> dict[str, str]:
    data = place.folder / "rows.jsonl"
    if not data.exists():
        model_folder(place.folder / "model")
        write_jsonl(data, articles(40))
    return {
        "BASE_MODEL": str(place.folder / "model"),
        "DATA_PATH": str(data),
        "OUTPUT_DIR": str(output),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }


def test_slurm_file_trains_in_two_tasks_and_continues_after_a_kill(place: Place, tmp_path: Path) -> None:
    command = ["bash", "recipes/slurm.sbatch", *arguments({**SETTINGS, "cache_dir": tmp_path / "cache"})]

    def variables(output: Path) -> dict[str, str]:
        slurm = {**SLURM_VARIABLES, "PROCESSES_PER_NODE": "1", "PORT": str(free_port())}
        return {**variables_of(place, output), **slurm}

    whole, part = tmp_path / "whole", tmp_path / "part"
    done = place.run(command, variables(whole))
    assert done.returncode == 0, done.stderr
    assert "weights sharded over 2 processes" in done.stdout
    killed_when(place, command, variables(part), lambda: (part / "checkpoint-4").exists())
    assert not (part / "adapter_model.safetensors").exists()
    done = place.run(command, variables(part))
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stdout
    for name in ("adapter_model.safetensors", "checkpoint-12/optimizer.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    done = place.run(command, variables(part))  # a job that was submitted once too often
    assert done.returncode == 0 and "finished" in done.stdout


def test_kept_output_continues_on_another_machine(place: Place, tmp_path: Path) -> None:
    kept = tmp_path / "bucket"

    def command(output: Path, bucket: Path) -> list[str]:
        # long enough that it is killed within, on a fast machine too
        settings = {**SETTINGS, "max_steps": 120, "save_steps": 20}
        settings |= {"output_dir": output, "cache_dir": tmp_path / "cache"}
        variables = variables_of(place, output)
        settings |= {"base_model": variables["BASE_MODEL"], "data_path": variables["DATA_PATH"]}
        words = [sys.executable, "-m", "yeonma", "sft", *arguments(settings)]
        return ["bash", "recipes/keep_output.sh", str(output), str(bucket), *words]

    whole, part = tmp_path / "whole", tmp_path / "part"
    done = place.run(command(whole, tmp_path / "other"), variables_of(place, whole))
    assert done.returncode == 0, done.stderr
    variables = {**variables_of(place, part), "KEEP_SECONDS": "1"}
    killed_when(place, command(part, kept), variables, lambda: any(kept.glob("checkpoint-*/*")))
    shutil.rmtree(part)  # the machine's disk is gone
    done = place.run(command(part, kept), variables)
    assert done.returncode == 0, done.stderr
    for folder in (part, kept):
        for name in (
            "adapter_model.safetensors",
            "checkpoint-120/optimizer.safetensors",
            "trained_rows.jsonl",
        ):
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
        losses = [[line.get("loss") for line in read_lines(one)] for one in (folder, whole)]
        assert losses[0] == losses[1]


def test_a_signal_to_the_keeper_stops_the_run_with_a_checkpoint(place: Place, tmp_path: Path) -> None:
    output, kept = tmp_path / "out", tmp_path / "kept"
    variables = variables_of(place, output)
    settings = {**SETTINGS, "max_steps": 500, "output_dir": output, "cache_dir": tmp_path / "cache"}
    settings |= {
        "base_model": variables["BASE_MODEL"],
        "data_path": variables["DATA_PATH"],
        "save_steps": 400,
    }
    words = [sys.executable, "-m", "yeonma", "sft", *arguments(settings)]
    process = subprocess.Popen(
        ["bash", "recipes/keep_output.sh", str(output), str(kept), *words],
        cwd=place.folder,
        env=place.environment(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 240
    while not (output / "metrics.jsonl").exists() or not read_lines(output):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    (checkpoint,) = output.glob("checkpoint-*")
    assert sorted(one.name for one in (kept / checkpoint.name).iterdir()) == sorted(
        one.name for one in checkpoint.iterdir()
    )
