"""The files under recipes/, run with stand-ins for the programs around Yeonma: queue, launcher, a pod's own tool."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
SLURM_VARIABLES = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
}
RECORDS = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
FIRST_HOST = "#!/bin/sh\necho localhost\n"


@dataclass(frozen=True)
class Place:
    """A folder with a copy of the recipes and of what they expect around them."""

    folder: Path
    programs: Path

    def run(
        self, command: Sequence[str], variables: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(variables),
            capture_output=True,
            text=True,
            **options,
        )

    def environment(self, variables: Mapping[str, str] | None = None) -> dict[str, str]:
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "RECORD": str(self.folder / "record"), "HOME": str(self.folder)}
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "HF_TOKEN")
        }
        return {**inherited, **own, **(variables or {})}

    def recorded(self) -> list[list[str]]:
        """The commands that stand-ins were called with."""
        return [json.loads(line) for line in (self.folder / "record").read_text().splitlines()]


def place_with(folder: Path, programs: Mapping[str, str]) -> Place:
    """`programs`: name -> the text of the stand-in."""
    shutil.copytree(RECIPES, folder / "recipes")
    bin_folder = folder / "programs"
    for path, text in {
        **{bin_folder / name: text for name, text in programs.items()},
        folder / ".venv" / "bin" / "activate": "",
        folder / ".venv" / "bin" / "yeonma": "#!/bin/sh\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return Place(folder, bin_folder)


def documents(name: str) -> list[dict[str, Any]]:
    return [dict(one) for one in yaml.safe_load_all((RECIPES / name).read_text(encoding="utf-8"))]


def launched(name: str, folder: Path) -> list[str]:
    """The torchrun command of a recipe, without what stands around it."""
    if name == "kubernetes.yaml":
        trainer = next(one for one in documents(name) if one["kind"] == "TrainJob")["spec"]["trainer"]
        return [*trainer["command"], *trainer["args"]]
    through = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    place = place_with(
        folder, {"torchrun": RECORDS, "runpodctl": RECORDS, "srun": through, "scontrol": FIRST_HOST}
    )
    variables = {"RUNPOD_POD_ID": "pod", "HF_HOME": str(folder / "hf")}
    if name == "slurm.sbatch":
        done = place.run(["bash", f"recipes/{name}"], {**SLURM_VARIABLES, **variables})
    elif name == "runpod.sh":
        done = place.run(["bash", f"recipes/{name}"], variables)
        assert place.recorded()[1] == ["runpodctl", "stop", "pod", "pod"]
    else:
        (task,) = documents(name)
        (kept,) = task["file_mounts"]
        script = task["run"].replace(f"{kept}/", f"{folder}/kept/")
        given = {"SKYPILOT_NUM_GPUS_PER_NODE": "4", **task["envs"], **task["secrets"]}
        done = place.run(["bash", "-c", script], given)
    assert done.returncode == 0, done.stderr
    return place.recorded()[0]
