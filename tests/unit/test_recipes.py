"""The files under recipes/: valid for the shell and as YAML, with settings that exist and values that they take.

`tests/slow/test_recipes.py` trains by them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from tests.recipes import RECIPES, ROOT, documents, launched, place_with
from yeonma.cli import VERBS
from yeonma.config.parse import read_config

LAUNCHERS = ("kubernetes.yaml", "runpod.sh", "skypilot.yaml", "slurm.sbatch")
SCRIPTS = ("keep_output.sh", "runpod.sh", "slurm.sbatch")
PAGES = ("scale.md", "scale.ko.md")


def test_all_recipes_are_known_here_and_on_the_pages() -> None:
    names = sorted(path.name for path in RECIPES.iterdir())
    assert names == sorted({*LAUNCHERS, *SCRIPTS})
    for page in PAGES:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert [name for name in names if f"recipes/{name}" not in text] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_reads_the_scripts(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(RECIPES / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_commands_have_settings_that_exist(tmp_path: Path, name: str) -> None:
    program, *words = launched(name, tmp_path)
    assert program == "torchrun"
    options = parse_args(words)
    assert options.module and options.training_script == "yeonma"
    verb, *settings = options.training_script_args
    parsed = read_config(VERBS[verb].config, settings, verb=verb, groups=VERBS[verb].groups)
    assert not parsed.warnings
    config = parsed.config
    assert config.model.base_model == "beomi/llama-2-ko-7b"
    assert config.data.data_path == "daekeun-ml/naver-news-summarization-ko"
    assert config.run.save_steps and config.run.output_dir
    several_nodes = name in ("kubernetes.yaml", "slurm.sbatch")
    assert config.model.shard is several_nodes


def test_slurm_asks_for_a_launcher_on_each_node_and_ends_the_run_in_time() -> None:
    lines = (RECIPES / "slurm.sbatch").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    asked = [line.split("#")[1].split()[1] for line in lines if line.startswith("#SBATCH")]
    assert asked == [option for option in asked if option.startswith("--")]
    options = dict(option.removeprefix("--").partition("=")[::2] for option in asked)
    assert (options["nodes"], options["ntasks-per-node"]) == ("2", "1")
    assert options["time"] == "04:00:00" and "--time_limit 3h50m" in "\n".join(lines)


def test_kubernetes_objects_belong_together() -> None:
    volume, runtime, job = documents("kubernetes.yaml")
    assert [one["kind"] for one in (volume, runtime, job)] == [
        "PersistentVolumeClaim", "TrainingRuntime", "TrainJob"
    ]  # fmt: skip
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    claims = {one["name"]: one.get("persistentVolumeClaim", {}).get("claimName") for one in pod["volumes"]}
    assert claims["work"] == volume["metadata"]["name"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(claims)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"--output_dir={mounts['work']}/title-generator" in job["spec"]["trainer"]["args"]
    seconds = {one["name"]: one.get("value") for one in job["spec"]["trainer"]["env"]}
    assert int(seconds["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


def test_skypilot_keeps_the_output_where_the_bucket_is() -> None:
    (task,) = documents("skypilot.yaml")
    ((place, bucket),) = task["file_mounts"].items()
    assert task["resources"]["use_spot"] is True and bucket["mode"] == "MOUNT_CACHED"
    assert f'keep_output.sh "$HOME/title-generator" {place}/' in task["run"]


WRITES = """
import sys, time
from pathlib import Path
output, kept = map(Path, sys.argv[1:3])
def step(number):
    (output / "run.json").write_text('{"finished": false}')
    with (output / "metrics.jsonl").open("a") as file:
        file.write(f"{number}\\n")
    (output / f"checkpoint-{number}").mkdir()
    (output / f"checkpoint-{number}" / "weights").write_text(str(number))
(output / ".checkpoint-3.partial").mkdir()
step(1)
until = time.monotonic() + 30
while not (kept / "checkpoint-1" / "weights").exists() and time.monotonic() < until:
    time.sleep(0.05)
step(2)
(output / "checkpoint-1" / "weights").unlink()
(output / "checkpoint-1").rmdir()
(output / "run.json").write_text('{"finished": true}')
sys.exit(75)
"""


def test_kept_output_is_copied_while_the_command_runs_and_brought_back(tmp_path: Path) -> None:
    place = place_with(tmp_path, {})
    output, kept = tmp_path / "out put", tmp_path / "kept"
    (tmp_path / "writes.py").write_text(WRITES)
    line = ["bash", "recipes/keep_output.sh", str(output), str(kept)]
    words = [sys.executable, "writes.py", str(output), str(kept)]
    done = place.run([*line, *words], {"KEEP_SECONDS": "1"})
    assert (done.returncode, done.stderr) == (75, "")
    expected = {
        "run.json": '{"finished": true}',
        "metrics.jsonl": "1\n2\n",
        "checkpoint-2/weights": "2",
    }

    def files(folder: Path) -> dict[str, str]:
        found = [one for one in folder.rglob("*") if one.is_file() and not one.name.startswith(".")]
        return {str(one.relative_to(folder)): one.read_text() for one in found}

    assert files(kept) == expected
    shutil.rmtree(output)
    done = place.run([*line, "true"])
    assert done.returncode == 0 and "bringing back" in done.stderr
    assert files(output) == files(kept) == expected
    for folder, part in (
        ("checkpoint-2", "weights"),
        (".", "metrics.jsonl"),
    ):  # as if it had not been uploaded whole
        place_of_part = kept / folder / part
        text = place_of_part.read_text()
        place_of_part.write_text(text[:-1])
        shutil.rmtree(output)
        done = place.run([*line, "true"])
        assert "leaving out checkpoint-2" in done.stderr
        assert [one.name for one in output.glob("checkpoint-*")] == []
        place_of_part.write_text(text)
    done = place.run([*line[:3], str(output)])
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
