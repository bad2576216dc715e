"""`yeonma dpo` in several processes gives the results of one process, including the reference log-probabilities."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.faults.zygote import Zygote, together
from tests.losses import FEATURES, compares, rows_for
from tests.pairs import PLAIN, pairs, tuned
from tests.runs import Done, arguments, model_folder, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


def settings_of(output: Path, base: Path, data: Path, settings: Mapping[str, object]) -> dict[str, object]:
    return {"base_model": base, "data_path": data, "output_dir": output, **PLAIN, **settings}


def run_command(command: list[str], output: Path, base: Path, data: Path, **settings: object) -> Done:
    words = arguments(settings_of(output, base, data, settings))
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    return Done(done.returncode, output, done.stdout, done.stderr)


def run_forked(zygotes: Zygote, output: Path, base: Path, data: Path, **settings: object) -> Done:
    return together(zygotes, "dpo", settings_of(output, base, data, settings))


def assert_same_run(several: Done, one: Done) -> None:
    assert (several.status, several.err) == (0, "")
    not_compared = {"seconds", "peak_memory_bytes", "reward_accuracy"}
    for ours, theirs in zip(several.lines, one.lines, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - not_compared:
            if ours[name] is not None or theirs[name] is not None:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4, rel=1e-4), name
    for name, weight in several.weights.items():
        assert float((weight - one.weights[name]).abs().max()) < 1e-3, name


@pytest.mark.parametrize("command", ["torchrun", "nproc"])
def test_two_processes_give_the_losses_and_rewards_of_one_process(
    zygotes: Zygote, tmp_path: Path, base: Path, command: str
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", pairs(17))
    settings: dict[str, object] = {"batch_size": 5, "val_set_size": 4, "eval_steps": 2, "num_epochs": 2}
    one = tuned(tmp_path / "one", base, data, **settings, cache_dir=tmp_path / "a")
    start = (
        [*TORCHRUN, "dpo-trainer.py"] if command == "torchrun" else [sys.executable, "-m", "yeonma", "dpo"]
    )
    nproc_setting = {} if command == "torchrun" else {"nproc": 2}
    two = run_command(
        start, tmp_path / "two", base, data, **settings, **nproc_setting, cache_dir=tmp_path / "b"
    )
    assert_same_run(two, one)
    assert two.out.count("reference: 17 of 17 computed") == 1
    again = run_forked(zygotes, tmp_path / "again", base, data, **settings, cache_dir=tmp_path / "b")
    assert "reference: " not in again.out  # the first process reads the cache for both
    assert again.losses == two.losses


def test_resumed_processes_recompute_the_same_reference_without_the_cache(
    zygotes: Zygote, tmp_path: Path, base: Path
) -> None:
    data, cache, out = write_jsonl(tmp_path / "rows.jsonl", pairs(17)), tmp_path / "cache", tmp_path / "out"
    settings: dict[str, object] = {"batch_size": 5, "val_set_size": 4, "save_steps": 1, "lora_dropout": 0.1}
    uninterrupted = run_forked(zygotes, out, base, data, **settings, cache_dir=cache)
    assert (uninterrupted.status, uninterrupted.err) == (0, "")
    (reference_file,) = cache.glob("*.reference")
    weights, reference_bytes = uninterrupted.weight_bytes, reference_file.read_bytes()
    # Leave the folder as a kill after the first step does.
    state = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert state["finished"] is True
    (out / "run.json").write_text(json.dumps({**state, "finished": False}), encoding="utf-8")
    for step in (2, 3):
        shutil.rmtree(out / f"checkpoint-{step}", ignore_errors=True)
    (out / "adapter_model.safetensors").unlink()
    reference_file.unlink()
    resumed = run_forked(zygotes, out, base, data, **settings, cache_dir=cache)
    assert "continuing after step 1 of 3" in resumed.out
    assert reference_file.read_bytes() == reference_bytes
    assert resumed.weight_bytes == weights


@pytest.mark.parametrize("feature", FEATURES)
def test_every_loss_in_two_processes_gives_the_results_of_one_process(
    zygotes: Zygote, tmp_path: Path, base: Path, feature: str
) -> None:
    settings: dict[str, object] = {
        "batch_size": 5,
        "max_steps": 4,
        "val_set_size": 5,
        "cache_dir": tmp_path / "cache",
        **FEATURES[feature],
    }
    data = rows_for(tmp_path, settings)
    one = tuned(tmp_path / "one", base, data, **settings)
    two = run_forked(zygotes, tmp_path / "two", base, data, **{"num_epochs": None, **settings})
    assert_same_run(two, one)
    if compares(settings):
        assert [two.steps[0][name] for name in two.steps[0] if name.startswith("reward_")].count(0.0) >= 3
